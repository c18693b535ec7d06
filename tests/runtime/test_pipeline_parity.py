"""The whole path against diffusers: the same checkpoint, prompts and seeds, the same pictures."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from engine.backends.settings import BackendSettings
from runtime import Pipeline, Request
from tests.support.deep_features import keeping_deep_features
from tests.support.parity import relative_error
from tests.support.pictures import drawing, psnr
from tests.support.schedulers import SCHEDULERS
from tests.support.tolerances import CACHED_LATENTS_RTOL, PICTURE_PSNR_DB

# Older numpy protocols of torch, and names that diffusers will drop: neither is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ["a red apple, fluent style", "house", "blue fish, noto style"]
NEGATIVE = ["blurry", "", "red, green"]
STEPS = 7
GUIDANCE = 5.0


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


@pytest.fixture(scope="module")
def text_to_image(pipeline):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        pipeline.model_path, safety_checker=None
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(torch.float32)  # the files are float16


@pytest.fixture(scope="module")
def image_to_image(text_to_image):
    loaded = diffusers.StableDiffusionImg2ImgPipeline(
        **text_to_image.components, requires_safety_checker=False
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def reference(loaded, sampler, seed, *, prompt, steps=STEPS, **options):
    """Draw with diffusers: one generator for each picture, their seeds counting up."""
    make = getattr(diffusers, SCHEDULERS[sampler])
    loaded.scheduler = make.from_config(loaded.scheduler.config)
    count = len(prompt) * options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    draw = partial(
        loaded,
        prompt if prompt != [None] else None,
        generator=generators,
        num_inference_steps=steps,
    )
    return draw(guidance_scale=GUIDANCE, **options).images


def assert_same_pictures(actual, expected):
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.size == theirs.size
        assert ours.mode == theirs.mode == "RGB"
        assert np.asarray(theirs).std() > 1, "a flat picture compares nothing"
        assert psnr(ours, theirs) >= PICTURE_PSNR_DB


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_batch(pipeline, text_to_image, sampler):
    expected = reference(text_to_image, sampler, 11, prompt=PROMPTS, negative_prompt=NEGATIVE)
    result = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVE,
        sampler=sampler,
        seed=11,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    assert_same_pictures(result.images, expected)
    assert result.seeds == [11, 12, 13]


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_image_to_image(pipeline, image_to_image, sampler, strength):
    image = drawing(128, 128)
    prompts = PROMPTS[:2]
    expected = reference(image_to_image, sampler, 0, prompt=prompts, image=image, strength=strength)
    result = pipeline(
        prompts,
        image=image,
        strength=strength,
        sampler=sampler,
        seed=0,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    assert_same_pictures(result.images, expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_twenty_steps(pipeline, text_to_image, sampler):
    prompt = PROMPTS[:1]
    expected = reference(text_to_image, sampler, 2**32 + 5, prompt=prompt, steps=20)
    result = pipeline(prompt, sampler=sampler, seed=2**32 + 5, guidance_scale=GUIDANCE)
    assert_same_pictures(result.images, expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_deep_features_are_kept_between_calls(pipeline, text_to_image, sampler):
    """Against diffusers' UNet with the features of every third call."""
    options = {"prompt": PROMPTS[0], "seed": 3, "sampler": sampler, "num_inference_steps": 10}
    plan = pipeline.plan(Request(guidance_scale=GUIDANCE, cache_interval=3, **options))
    *_, last = pipeline.denoise(plan)
    exact = pipeline.plan(Request(guidance_scale=GUIDANCE, **options))
    *_, other = pipeline.denoise(exact)
    with keeping_deep_features(text_to_image.unet, 3) as whole:
        expected = reference(
            text_to_image, sampler, 3, prompt=PROMPTS[:1], steps=10, output_type="latent"
        )
    assert whole == plan.full_calls == [call in (0, 3, 6, 9) for call in range(10)]
    assert relative_error(torch.from_numpy(last.latents), expected) < CACHED_LATENTS_RTOL
    assert relative_error(torch.from_numpy(other.latents), expected) > 10 * CACHED_LATENTS_RTOL


def test_several_images_of_each_prompt(pipeline, text_to_image):
    options = {"negative_prompt": NEGATIVE[:2], "num_images_per_prompt": 2}
    expected = reference(text_to_image, "ddim", 40, prompt=PROMPTS[:2], **options)
    result = pipeline(
        PROMPTS[:2], seed=40, num_inference_steps=STEPS, guidance_scale=GUIDANCE, **options
    )
    assert_same_pictures(result.images, expected)


def test_a_picture_that_is_not_square(pipeline, text_to_image):
    size = {"height": 96, "width": 160}
    expected = reference(text_to_image, "dpmpp_2m", 6, prompt=PROMPTS[:1], **size)
    result = pipeline(
        PROMPTS[0],
        sampler="dpmpp_2m",
        seed=6,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        **size,
    )
    assert result.images[0].size == (160, 96)
    assert_same_pictures(result.images, expected)


def test_an_image_that_is_not_square(pipeline, image_to_image):
    image = drawing(96, 144)  # of other sides diffusers changes the size
    expected = reference(image_to_image, "euler", 6, prompt=PROMPTS[:1], image=image, strength=0.8)
    result = pipeline(
        PROMPTS[:1],
        sampler="euler",
        seed=6,
        image=image,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    assert result.images[0].size == (144, 96)
    assert_same_pictures(result.images, expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_guidance(pipeline, text_to_image, guidance_scale):
    text_to_image.scheduler = diffusers.DDIMScheduler.from_config(text_to_image.scheduler.config)
    expected = text_to_image(
        PROMPTS[0],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
    ).images
    result = pipeline(PROMPTS[0], seed=3, num_inference_steps=STEPS, guidance_scale=guidance_scale)
    assert_same_pictures(result.images, expected)


def embeds(loaded, words, size=30):
    """Encode words in rows of 30 tokens, put after each other."""
    ids = loaded.tokenizer(words, add_special_tokens=False, truncation=False).input_ids
    start, end = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id
    rows = [ids[at : at + size] for at in range(0, max(len(ids), 1), size)]
    full = torch.tensor([[start, *row, *[end] * (size + 1 - len(row))] for row in rows])
    with torch.no_grad():
        return loaded.text_encoder(full)[0].reshape(1, -1, loaded.unet.config.cross_attention_dim)


def test_clip_skip(pipeline, text_to_image):
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    result = pipeline("house", seed=3, clip_skip=2, negative_prompt="blurry", **options)
    encoder = text_to_image.text_encoder
    inner = getattr(encoder, "text_model", encoder)  # by the version of transformers
    tokens = text_to_image.tokenizer(
        ["house", "blurry"], padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        told, negative = inner.final_layer_norm(states).split(1)
    expected = reference(
        text_to_image, "ddim", 3, prompt=[None], prompt_embeds=told, negative_prompt_embeds=negative
    )
    assert_same_pictures(result.images, expected)


# The tokenizer warns of a length for which it is told that it may be longer.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_long_prompt(pipeline, text_to_image):
    prompt = "a red apple " * 12 + "fluent style"
    result = pipeline(prompt, seed=3, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    told, empty = (embeds(text_to_image, words) for words in (prompt, ""))
    assert told.shape[1] == 64
    expected = reference(
        text_to_image,
        "ddim",
        3,
        prompt=[None],
        prompt_embeds=told,
        negative_prompt_embeds=torch.cat([empty, empty], dim=1),
    )
    assert_same_pictures(result.images, expected)


def test_a_prompt_that_changes(pipeline, text_to_image):
    loaded = text_to_image
    options = {"seed": 3, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    result = pipeline("[house:blue fish:3], noto style", sampler="euler", **options)
    texts = "", "house, noto style", "blue fish, noto style"
    empty, before, after = (embeds(loaded, text) for text in texts)

    def change(_, step, timestep, tensors):
        return {"prompt_embeds": torch.cat([empty, before if step + 1 < 3 else after])}

    expected = reference(
        loaded,
        "euler",
        3,
        prompt=[None],
        prompt_embeds=before,
        negative_prompt_embeds=empty,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert_same_pictures(result.images, expected)


def test_the_checker_would_see_another_seed(pipeline):
    images = pipeline(PROMPTS[0], num_images_per_prompt=2, seed=3, num_inference_steps=2).images
    assert psnr(*images) < PICTURE_PSNR_DB
