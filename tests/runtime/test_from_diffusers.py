"""Code that was written for diffusers: its arguments mean the same here, or are refused."""

import copy
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import GraphError, ModelError, RequestError
from engine.model import Model, find_model
from runtime import Hires, Pipeline, Request
from runtime.diffusers_arguments import EMBEDS, UNUSED
from runtime.request_options import CallOptions
from tests.support.pictures import drawing

PAGE = Path(__file__).parents[2] / "docs" / "from-diffusers.md"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=BackendSettings(backend="cpu", threads=1))


def pixels(result):
    return [np.asarray(image).tobytes() for image in result.images]


class Generator:
    """What is asked of torch's."""

    def __init__(self, seed, device="cpu"):
        self.seed, self.device = seed, SimpleNamespace(type=device)

    def initial_seed(self):
        return self.seed


def test_none_is_the_default_everywhere(pipeline):
    nothing = dict.fromkeys((*CallOptions.__annotations__, *UNUSED))
    given = {**nothing, **SMALL, "seed": 7}
    assert pixels(pipeline("a cat", **given)) == pixels(pipeline("a cat", seed=7, **SMALL))
    assert Hires(scale=None, strength=None, upscaler=None) == Hires()
    names = ("vae", "preview_decoder", "loras", "embeddings", "prediction_type", "graphs")
    Pipeline.load("pictogram", **dict.fromkeys((*names, "precision", "settings")))
    pipeline.set_loras(None)
    pipeline.set_embeddings(None)


def test_generators_give_their_seeds(pipeline):
    one = pipeline("a cat", generator=Generator(7), **SMALL)
    assert one.seeds == [7]
    two = pipeline("a", num_images_per_prompt=2, generator=[Generator(9), Generator(4)], **SMALL)
    assert two.seeds == [9, 4]
    plan_of = pipeline("a", generator=Generator(7, "cuda"), **SMALL)
    assert plan_of.settings[0]["noise"] == "cuda"
    assert pixels(one) == pixels(pipeline("a cat", seed=7, **SMALL))
    torch = pytest.importorskip("torch")
    by_torch = pipeline("a cat", generator=torch.Generator().manual_seed(7), **SMALL)
    assert pixels(by_torch) == pixels(one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generator": 7}, "generator came as int; give seed=7"),
        ({"generator": np.random.default_rng(0)}, "generator came as Generator; give seed=7"),
        ({"generator": [Generator(1), "x"]}, "generator came as str"),
        ({"generator": []}, "empty list"),
        ({"generator": Generator(1), "seed": 1}, "came together"),
        ({"generator": [Generator(1)] * 2}, "seed has 2 numbers for 1 pictures"),
        ({"output_type": "pt"}, "output_type is 'pt'; choose one of pil, np, latent"),
        ({"return_dict": False}, "return_dict is False"),
        ({"callback_on_step_end": 3}, "cannot be called"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "only the latents"),
        ({"cross_attention_kwargs": {}}, "cross_attention_kwargs is no option"),
        ({"latents": "x"}, "latents came as str; give an array"),
        ({"latents": np.ones((1, 8, 4))}, "give finite ones with 4 axes"),
        ({"latents": np.full((1, 8, 4, 4), np.nan)}, "numbers that are none"),
        ({"latents": np.ones((2, 8, 4, 4))}, r"latents are \(2, 8, 4, 4\); give \(1, 8, 4, 4\)"),
        ({"latents": np.ones((1, 8, 4, 4)), "image": drawing(32, 32)}, "came together"),
        ({"prompt_embeds": np.ones((1, 77, 128))}, "prompt and prompt_embeds came together"),
        ({"negative_prompt_embeds": np.ones((1, 77, 128))}, "without prompt_embeds"),
        (
            {"latents": np.ones((1, 8, 4, 4)), "variation_strength": 0.5},
            "latents and variation_strength came together",
        ),
        ({"sigmas": [1.0]}, "did you mean schedule"),
        ({"ip_adapter_image": drawing(32, 32)}, "did you mean image_prompts"),
        ({"mask_image": Image.new("L", (8, 8))}, "did you mean mask"),
        ({"padding_mask_crop": 32}, "did you mean inpaint_area and mask_padding"),
    ],
)
def test_what_cannot_mean_the_same_is_refused(pipeline, options, said):
    with pytest.raises(RequestError, match=said):
        pipeline("a", **SMALL, **options)


def test_embeddings_that_change_nothing_are_said(pipeline):
    (context,) = {id(c["context"]): c["context"] for c in pipeline.plan(
        Request(prompt="a cat", guidance_scale=3.0, **SMALL)
    ).conditioning}.values()  # fmt: skip
    embeds = {"prompt_embeds": context[1], "negative_prompt_embeds": context[0]}
    assert pipeline(guidance_scale=3.0, **embeds, **SMALL).notes == ()
    (note,) = pipeline(guidance_scale=1.0, **embeds, **SMALL).notes
    assert note == "negative_prompt_embeds changes nothing: nothing is guided"
    with pytest.raises(RequestError, match="negative_prompt and negative_prompt_embeds came"):
        pipeline(negative_prompt="blurry", **embeds, **SMALL)


def test_a_call_needs_a_prompt(pipeline):
    with pytest.raises(RequestError, match="prompt is None"):
        pipeline(**SMALL)


def test_output_types(pipeline):
    chosen = {"seed": 3, "num_images_per_prompt": 2, **SMALL}
    drawn = pipeline("a cat", **chosen)
    floats = pipeline("a cat", output_type="np", **chosen)
    assert (floats.images.shape, floats.images.dtype) == ((2, 32, 32, 3), np.float32)
    assert ((floats.images * 255).round().astype(np.uint8).tobytes()) == b"".join(pixels(drawn))
    latents = pipeline("a cat", output_type="latent", **chosen)
    assert (latents.images.shape, latents.images.dtype) == ((2, 8, 4, 4), np.float32)
    assert [np.asarray(i).tobytes() for i in pipeline.decode(latents.images)] == pixels(drawn)
    assert drawn.seeds == floats.seeds == latents.seeds == [3, 4]
    assert drawn.settings == floats.settings == latents.settings


def test_a_callback_sees_and_changes_the_latents(pipeline):
    seen = []

    def watch(pipe, step, timestep, inputs):
        assert pipe is pipeline
        seen.append((step, float(timestep), inputs["latents"].shape))
        return {}

    chosen = {"seed": 3, "num_images_per_prompt": 6, **SMALL}
    plain = pipeline("a cat", **chosen)
    assert pixels(pipeline("a cat", callback_on_step_end=watch, **chosen)) == pixels(plain)
    timesteps = pipeline.plan(Request(prompt="a", **SMALL)).program.timesteps
    assert seen == [(i, t, (6, 8, 4, 4)) for i, t in enumerate(timesteps)], "all in one batch"

    def clear(pipe, step, timestep, inputs):
        return {"latents": inputs["latents"] * (step < 2)}

    changed = pipeline("a cat", callback_on_step_end=clear, output_type="latent", **chosen)
    assert not changed.images.any()

    def stop(pipe, step, timestep, inputs):
        seen.append(step)
        pipe._interrupt = True
        return None

    seen.clear()
    first = pipeline("a cat", callback_on_step_end=stop, output_type="latent", **chosen)
    assert seen == [0]
    assert first.images.any()
    assert pixels(pipeline("a cat", **chosen)) == pixels(plain), "the next call goes on"

    def wrong(pipe, step, timestep, inputs):
        return {"prompt_embeds": 0}

    with pytest.raises(RequestError, match="returned prompt_embeds; only the latents"):
        pipeline("a cat", callback_on_step_end=wrong, **chosen)


def test_latents_are_the_noise_to_start_from(pipeline):
    from runtime.noise import TorchNoise

    noise = np.stack([TorchNoise(seed).normal((8, 4, 4)) for seed in (5, 6)])
    chosen = {"num_images_per_prompt": 2, **SMALL}
    expected = pixels(pipeline("a cat", seed=5, **chosen))
    assert pixels(pipeline("a cat", latents=noise, **chosen)) == expected
    torch_like = SimpleNamespace(detach=lambda: chain)
    chain = SimpleNamespace(cpu=lambda: chain, float=lambda: chain, numpy=lambda: noise)
    assert pixels(pipeline("a cat", latents=torch_like, **chosen)) == expected


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_embeddings_stand_for_texts(pipeline, scale):
    texts = {"prompt": ["a cat", "a red hat"], "negative_prompt": "blue"}
    chosen = {"seed": 5, "guidance_scale": scale, "num_images_per_prompt": 2, **SMALL}
    plan = pipeline.plan(Request(**texts, guidance_scale=4.0, **SMALL))
    negative, positive = plan.conditioning[0]["context"]
    expected = pixels(pipeline(**texts, **chosen))
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert pixels(pipeline(**embeds, **chosen)) == expected
    by_text = {"prompt_embeds": positive, "negative_prompt": "blue"}
    assert pixels(pipeline(**by_text, **chosen)) == expected
    longer = {"prompt_embeds": np.concatenate([positive] * 2, axis=1)}
    if scale > 1:
        with pytest.raises(RequestError, match=r"negative_prompt_embeds are .* are needed"):
            pipeline(**longer, **chosen)
    else:
        assert pixels(pipeline(**longer, **chosen)) != expected


def test_texts_in_place_of_paths_and_lists(tmp_path):
    vae = str(find_model("pictogram") / "vae")
    by_text = Pipeline.load("pictogram", vae=vae, preview_decoder="own", graphs=None)
    assert by_text.model.given["vae"] == Path(vae)
    for choice, said in (
        ({"loras": "nosuch.safetensors:0.8"}, "nosuch.safetensors does not exist"),
        ({"embeddings": "nosuch.pt"}, "nosuch.pt does not exist"),
        ({"loras": Path("nosuch.bin")}, "nosuch.bin does not exist"),
        ({"preview_decoder": "nosuch"}, "nosuch"),
        ({"vae": "nosuch"}, "nosuch"),
    ):
        with pytest.raises(ModelError, match=said):
            Pipeline.load("pictogram", **choice)
    with pytest.raises(GraphError, match=re.escape(str(tmp_path))):
        Engines.choose(Model.open(find_model("pictogram")), graphs=str(tmp_path)).graph("step")


def test_a_pipeline_is_not_pickled(pipeline):
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"load one in each process by Pipeline.load\("):
            refused(pipeline)


def test_the_page_names_every_argument():
    text = PAGE.read_text(encoding="utf-8")
    for name in (CallOptions.__annotations__.keys() - Request.__dataclass_fields__.keys()) | {
        *EMBEDS,
        "mask_image",
        "padding_mask_crop",
        "clip_skip",
    }:
        assert f"`{name}" in text, name
