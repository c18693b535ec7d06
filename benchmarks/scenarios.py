"""What contenders are given to compute: a model, a request, and each part's inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.diffusers_folder import write_folder
from benchmarks.load import write_checkpoint
from benchmarks.random_models import RANDOM_MODELS, write_random
from engine.errors import RequestError
from engine.graphs.graph import Part
from engine.model import Model, find_model
from engine.store.cache import cache_folder
from runtime.conditioning.tokenizer import load_tokenizers

SEED, TIMESTEP = 7, 500
PARTS = ("text", "step", "decode")  # of a request, which is the fourth thing measured
WHOLE = "whole"
# What is measured beside these on a GPU: steps queued in a row, which hide what a single call costs
# the processor, and a longer request.
QUEUED, STEPS = 10, "10 steps"
LONGER_STEPS = 50
ENGINES: Mapping[str, Part] = {"text": "text_encoder", "step": "step", "decode": "vae_decoder"}
Parts = Mapping[str, Callable[[], NDArray[Any]]]


def whole_of(steps: int) -> str:
    """Name a request of another number of steps than its scenario's."""
    return f"{WHOLE} of {steps} steps"


LONGER = whole_of(LONGER_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A model, a request, and how long anything may take.

    size: pixels along one side; batch: pictures of one request
    ready_s, run_s, whole_s: a contender's time to open and warm up, for a part, for a request
    headroom_bytes: what must stay free on the machine for contenders to stay open side by side
    more_steps: of a second request that is measured too, 0 for none
    runs_whole: whether requests are soon enough drawn to be run, and not added up from parts
    beside: scenarios of other models, which are measured in the same run
    precisions: those that are compared; all where there is none
    """

    name: str
    title: str
    size: int
    ready_s: float
    run_s: float
    whole_s: float
    headroom_bytes: int
    batch: int = 1
    prompt: str = "a red apple, fluent style"
    steps: int = 20
    guidance_scale: float = 5.0
    more_steps: int = 0
    runs_whole: bool = False
    beside: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str) -> "Scenario":
        """Return the scenario of a model's name, or of a `key`.

        Raises RequestError when there is none.
        """
        model, _, rest = name.partition("-")
        size, _, batch = rest.partition("-x")
        if model not in MODELS or not (rest == "" or (size.isdigit() and batch.isdigit())):
            raise RequestError(f"the model {name!r} is not known; choose {', '.join(MODELS)}")
        chosen = MODELS[model]
        return replace(chosen, size=int(size), batch=int(batch)) if rest else chosen

    @property
    def key(self) -> str:
        """The model, the size and the batch as a name, such as "sd15-768-x4"."""
        return f"{self.name}-{self.size}-x{self.batch}"

    @property
    def is_guided(self) -> bool:
        """Whether every step computes the UNet with and without the text."""
        return self.guidance_scale > 1

    @property
    def wholes(self) -> dict[str, int]:
        """Its requests, and the steps of each."""
        more = {whole_of(self.more_steps): self.more_steps} if self.more_steps else {}
        return {WHOLE: self.steps, **more}

    def options(self) -> dict[str, Any]:
        """Return the request as a pipeline's arguments, here and in diffusers."""
        return {
            "height": self.size,
            "width": self.size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "num_images_per_prompt": self.batch,
        }

    def model(self) -> Path:
        """Return the file or folder that the project's own pipelines load."""
        if not self.is_made():
            return find_model(self.name)
        folder = cache_folder() / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        if self.name in RANDOM_MODELS:
            return write_random(self.name, folder)
        return write_checkpoint(folder)

    def is_made(self) -> bool:
        """Tell whether the model is made by this benchmark, of random numbers."""
        return self.name in MADE

    def folder(self) -> Path:
        """Return the same model as a folder in diffusers' layout, for the peers."""
        model = self.model()
        return model if model.is_dir() else write_folder(Model.open(model))


SCENARIOS = {
    "pictogram": Scenario(
        name="pictogram",
        title="the model that ships",
        size=128,
        ready_s=600,
        run_s=10,
        whole_s=60,
        headroom_bytes=2**30,
        runs_whole=True,
    ),
    "sd15": Scenario(
        name="sd15",
        title="Stable Diffusion 1.5, random weights",
        size=512,
        ready_s=1500,
        run_s=120,
        whole_s=900,
        headroom_bytes=8 * 2**30,
    ),
}
# Models distilled to few steps; the first has the tiny decoder, and is measured beside the others.
SD_TURBO = replace(
    SCENARIOS["sd15"],
    name="sdturbo",
    title="SD-Turbo with a tiny decoder, random weights",
    whole_s=120,
    steps=1,
    guidance_scale=1.0,
    more_steps=4,
    runs_whole=True,
    beside=("sdturbo_full", "sdxs"),
    precisions=("bfloat16",),
)
FEW_STEPS = {
    "sdturbo": SD_TURBO,
    "sdturbo_full": replace(
        SD_TURBO,
        name="sdturbo_full",
        title="SD-Turbo with its full decoder, random weights",
        beside=(),
    ),
    "sdxs": replace(
        SD_TURBO, name="sdxs", title="SDXS-512 with a tiny decoder, random weights", beside=()
    ),
}
# With those that only a GPU draws in a time that somebody waits for.
MODELS = {
    **SCENARIOS,
    **FEW_STEPS,
    "sd21": replace(
        SCENARIOS["sd15"],
        name="sd21",
        title="Stable Diffusion 2.1, random weights",
        size=768,
        headroom_bytes=12 * 2**30,
    ),
    "xl": replace(
        SCENARIOS["sd15"],
        name="xl",
        title="Stable Diffusion XL, random weights",
        size=1024,
        headroom_bytes=24 * 2**30,
    ),
}
MADE = ("sd15", *RANDOM_MODELS)


def arrays(scenario: Scenario, model: Model) -> dict[str, NDArray[Any]]:
    """Return what all contenders are given: rows of ids, latents and the text's states.

    input_ids, and input_ids_2 of a second text encoder: (g, n), [uncond, cond], or cond alone where
    nothing is guided; latents: (B, C, h, w); context: (g, n, D); in XL text_embeds (g, P) and
    time_ids (g, T)
    """
    rng = np.random.default_rng(SEED)
    texts = ["", scenario.prompt] if scenario.is_guided else [scenario.prompt]
    given: dict[str, NDArray[Any]] = {
        name.replace("text_encoder", "input_ids"): tokenizer(texts).input_ids
        for name, tokenizer in load_tokenizers(model).items()
    }
    rows = given["input_ids"].shape
    side = scenario.size // model.vae.compression
    shape = (scenario.batch, model.vae.latent_channels, side, side)
    given["latents"] = rng.standard_normal(shape, np.float32)
    given["context"] = rng.standard_normal((*rows, model.unet.cross_attention_dim), np.float32)
    if "time_ids" in model.unet.extra_inputs:
        width = model.text_encoders["text_encoder_2"].projection_dim
        given["text_embeds"] = rng.standard_normal((len(texts), width), np.float32)
        time_ids = [scenario.size, scenario.size, 0, 0, scenario.size, scenario.size]
        given["time_ids"] = np.array([time_ids] * len(texts), np.float32)
    return given


def engine_inputs(scenario: Scenario, model: Model) -> dict[Part, dict[str, NDArray[Any]]]:
    """Return the inputs of the project's own engines: shapes and dtypes of their signatures.

    The step's matrix takes the guided output of the UNet and nothing else, which is what the
    peers compute.
    """
    given = arrays(scenario, model)
    latents, scale = given["latents"], scenario.guidance_scale

    def each(*values: float) -> NDArray[np.float32]:
        return np.array([values] * scenario.batch, np.float32)

    def groups(name: str) -> NDArray[Any]:
        return np.repeat(given[name][:, None], scenario.batch, axis=1)

    guidance = each(1 - scale, scale) if scenario.is_guided else each(1)
    step = {
        "registers": latents[:, None],
        "matrices": each(0, 1, 0)[:, None],
        "timestep": each(TIMESTEP)[:, 0],
        "input_scale": each(1)[:, 0],
        "context": groups("context"),
        "guidance": np.ascontiguousarray(guidance.T)[..., None, None, None],
        "guidance_rescale": each(0)[:, 0],
        "noise": np.zeros_like(latents),
        "mask": np.ones_like(latents[:, :1]),
        "outside": each(0, 0, 0),
    }
    step |= {name: groups(name) for name in model.unet.extra_inputs if name in given}
    encoders: dict[Part, dict[str, NDArray[Any]]] = {
        name: {
            "input_ids": given[name.replace("text_encoder", "input_ids")],
            "extra_embeddings": np.zeros((1, config.hidden_size), np.float32),
        }
        for name, config in model.text_encoders.items()
    }
    return {**encoders, "step": step, "vae_decoder": {"latents": latents}}
