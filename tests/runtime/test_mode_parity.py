"""Every sampler in every mode against diffusers, on the model that ships: the same pictures."""

from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from engine.backends.settings import BackendSettings
from runtime import Hires, Pipeline
from runtime.images.frame import Frame
from tests.support.pictures import drawing, psnr
from tests.support.schedulers import CLASSES, make_scheduler
from tests.support.tolerances import LATENTS_ATOL, PICTURE_PSNR_DB

# Older numpy protocols of torch, and names that diffusers will drop: neither is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SAMPLERS = [name for name in CLASSES if name != "edm_euler"]  # which is for models of its own kind
FIELDS = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "blurry"}
PROMPT, SEED = "a red apple, fluent style", 11
HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


@pytest.fixture(scope="module")
def modes(pipeline):
    """Load diffusers' pipelines of the same weights."""
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        pipeline.model_path, safety_checker=None
    ).to(torch.float32)
    parts = {**loaded.components, "requires_safety_checker": False}
    made = {
        "text": loaded,
        "image": diffusers.StableDiffusionImg2ImgPipeline(**parts),
        "mask": diffusers.StableDiffusionInpaintPipeline(**parts),
    }
    for mode in made.values():
        mode.set_progress_bar_config(disable=True)
    return {**made, "config": loaded.scheduler.config}


def reference(modes, mode, sampler, **fields):
    """Draw one picture with diffusers."""
    loaded, generator = modes[mode], torch.Generator().manual_seed(SEED)
    channels = loaded.vae.config.latent_channels
    # Its inpainting takes any number of channels but four and nine for a mistake.
    loaded.unet.register_to_config(in_channels=4 if mode == "mask" else channels)
    loaded.scheduler = scheduler = make_scheduler(sampler, modes["config"])
    if sampler == "dpmpp_sde":  # independent noise, in place of the Brownian tree of torchsde
        shape = (1, channels, HEIGHT // 8, WIDTH // 8)
        draw = lambda *_: torch.randn(shape, generator=generator)  # noqa: E731
        after(scheduler, "set_timesteps", lambda *_: setattr(scheduler, "noise_sampler", draw))
    if sampler == "lms":  # it would weigh slopes that were never computed as if they were
        after(scheduler, "set_begin_index", lambda first: leave_out(scheduler, first))
    if sampler in ("dpm2", "dpmpp_sde"):
        scheduler.add_noise = partial(noised_as_seen, scheduler)
    given = loaded(PROMPT, generator=[generator], **FIELDS, **fields).images
    return given if fields.get("output_type") == "latent" else given[0]


def after(scheduler, name, then):
    """Let something happen after a method of a scheduler."""
    method = getattr(scheduler, name)

    def both(*arguments, **options):
        method(*arguments, **options)
        then(*arguments)

    setattr(scheduler, name, both)


def leave_out(scheduler, first):
    scheduler.sigmas = scheduler.sigmas[first:]
    scheduler._begin_index = 0


def noised_as_seen(scheduler, latents, noise, timesteps):
    """Noise as much as the UNet is told that there is.

    At the call inside a step these two schedulers' own `add_noise` takes the sigma of its end.
    """
    one = torch.ones((), dtype=torch.float64)
    before = scheduler._step_index, scheduler.begin_index
    scale = scheduler.scale_model_input(one, timesteps[0])
    scheduler._step_index = before[0]
    return latents + noise * (1 / scale**2 - 1).sqrt().to(noise.dtype)


def half(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 :, width // 3 :] = 255
    return Image.fromarray(mask)


def drawn(pipeline, sampler, **fields):
    """Draw the picture as it is decoded, before the old one's pixels are put back."""
    own = {"paste_back": False} if "mask" in fields else {}
    return pipeline(PROMPT, sampler=sampler, seed=SEED, **own, **FIELDS, **fields).images[0]


def assert_same(actual, expected):
    assert actual.size == expected.size
    assert np.asarray(expected).std() > 1, "a flat picture compares nothing"
    assert psnr(actual, expected) >= PICTURE_PSNR_DB


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(pipeline, modes, sampler):
    size = {"height": HEIGHT, "width": WIDTH}
    assert_same(drawn(pipeline, sampler, **size), reference(modes, "text", sampler, **size))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image(pipeline, modes, sampler):
    fields = {"image": drawing(HEIGHT, WIDTH), "strength": 0.7}
    assert_same(
        drawn(pipeline, sampler, **fields),
        reference(modes, "image", sampler, **fields),
    )


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting(pipeline, modes, sampler, strength):
    fields = {
        "image": drawing(HEIGHT, WIDTH),
        "mask": half(HEIGHT, WIDTH),
        "strength": strength,
    }
    ours = drawn(pipeline, sampler, **fields)
    fields["mask_image"] = fields.pop("mask")
    assert_same(ours, reference(modes, "mask", sampler, height=HEIGHT, width=WIDTH, **fields))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_hires(pipeline, modes, sampler, monkeypatch):
    small = {"height": HEIGHT // 2, "width": WIDTH // 2}
    hires = Hires(strength=0.5, upscaler="bilinear")
    latents = reference(modes, "text", sampler, output_type="latent", **small)
    larger = torch.nn.functional.interpolate(
        latents, size=(HEIGHT // 8, WIDTH // 8), mode="bilinear"
    )
    monkeypatch.setattr(modes["image"].vae, "encode", lambda given: SimpleNamespace(latents=given))
    # Unless told, it takes four channels alone for latents.
    modes["image"].image_processor.register_to_config(vae_latent_channels=larger.shape[1])
    expected = reference(modes, "image", sampler, image=larger, strength=0.5)
    assert_same(drawn(pipeline, sampler, hires=hires, **small), expected)


def test_guidance_rescale(pipeline, modes):
    size = {"height": HEIGHT, "width": WIDTH, "guidance_rescale": 0.7}
    expected = reference(modes, "text", "ddim", **size)
    assert_same(drawn(pipeline, "ddim", **size), expected)
    size["guidance_rescale"] = 0.0
    assert psnr(drawn(pipeline, "ddim", **size), expected) < PICTURE_PSNR_DB


def test_guidance_that_changes(pipeline, modes):
    scales = [6.0, 5.0, 4.0, 3.0, 2.0, 1.5]

    def change(loaded, step, timestep, tensors):
        loaded._guidance_scale = scales[min(step + 1, 5)]
        return {}

    loaded = modes["text"]
    loaded.scheduler = make_scheduler("euler", modes["config"])
    fields = {**FIELDS, "height": HEIGHT, "width": WIDTH}
    given = loaded(
        PROMPT,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=change,
        **{**fields, "guidance_scale": scales[0]},
    )
    fields["guidance_scale"] = scales
    ours = pipeline(PROMPT, sampler="euler", seed=SEED, **fields)
    assert_same(ours.images[0], given.images[0])


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 201), (40, 60, 130, 110)),
        ((300, 201), (250, 2, 298, 90)),
        ((90, 260), (0, 9, 90, 250)),
    ],
)
def test_only_what_is_masked(pipeline, modes, size, box):
    """diffusers' `padding_mask_crop`: the crop, its enlargement, and the way back."""
    photo = drawing(size[1], size[0])
    mask = Image.new("L", size)
    mask.paste(255, box)
    sides = {"height": WIDTH, "width": WIDTH}
    expected = reference(
        modes, "mask", "ddim", image=photo, mask_image=mask, padding_mask_crop=16, **sides
    )
    options = {"inpaint_area": "masked", "mask_padding": 16, "mask_blur": 0}
    actual = pipeline(
        PROMPT, seed=SEED, image=photo, mask=mask, **options, **sides, **FIELDS
    ).images[0]
    assert actual.size == expected.size == size
    inside = np.asarray(mask) > 0
    before, a, b = (np.asarray(each) for each in (photo, actual, expected))
    assert (a[~inside] == before[~inside]).all()
    assert psnr(a[inside], b[inside]) >= PICTURE_PSNR_DB
    assert psnr(a[inside], before[inside]) < 30, "something was painted"


def test_the_crop_is_diffusers():
    """For masks of any place and shape, as long as the picture reaches."""
    random = np.random.default_rng(0)
    crop = diffusers.image_processor.VaeImageProcessor.get_crop_region
    for _ in range(300):
        width, height, w, h = (int(n) for n in random.integers(20, 300, 4))
        left, top = int(random.integers(width)), int(random.integers(height))
        right, bottom = int(random.integers(left, width)), int(random.integers(top, height))
        photo, mask, pad = Image.new("RGB", (width, height)), Image.new("L", (width, height)), 7
        mask.paste(255, (left, top, right + 1, bottom + 1))
        box = Frame.masked(photo, mask, 8 * h, 8 * w, pad).box
        expected = crop(mask, 8 * w, 8 * h, pad)
        assert np.abs(np.subtract(box, expected)).max() <= 1, "it rounds in floating point"


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_arguments_of_a_call(pipeline, modes, sampler):
    """What a callback sees, latents to start from, embeddings: the same numbers go through both."""
    seen, ours = [], []

    def watch(loaded, step, timestep, tensors):
        seen.append((step, float(timestep), np.array(tensors["latents"])))
        return tensors

    def look(loaded, step, timestep, tensors):
        ours.append((step, float(timestep), tensors["latents"]))

    loaded, size = modes["text"], {"height": HEIGHT, "width": WIDTH}
    loaded.unet.register_to_config(in_channels=loaded.vae.config.latent_channels)
    loaded.scheduler = make_scheduler(sampler, modes["config"])
    positive, negative = loaded.encode_prompt(PROMPT, "cpu", 1, True, "blurry")
    generator = torch.Generator().manual_seed(3)
    shape = (1, loaded.vae.config.latent_channels, HEIGHT // 8, WIDTH // 8)
    given = {
        **{"prompt_embeds": positive, "negative_prompt_embeds": negative, "prompt": None},
        **{"latents": torch.randn(shape, generator=generator), "guidance_scale": 4.0},
        **{"num_inference_steps": 4, "output_type": "np", **size},
    }
    expected = loaded(**given, callback_on_step_end=watch).images
    actual = pipeline(**given, sampler=sampler, callback_on_step_end=look).images
    assert actual.shape == expected.shape
    assert psnr(255 * actual, 255 * expected) >= PICTURE_PSNR_DB
    for (step, timestep, latents), (their_step, their_timestep, theirs) in zip(
        ours, seen, strict=True
    ):
        assert step == their_step
        assert abs(timestep - their_timestep) < 1e-3
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(latents / scale, theirs / scale, atol=LATENTS_ATOL)
