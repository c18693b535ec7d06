"""What contenders are given to compute: a model, a request, and each part's inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.diffusers_folder import write_folder
from benchmarks.load import write_checkpoint
from engine.cache import cache_folder
from engine.errors import RequestError
from engine.model import Model
from engine.models import find_model
from engine.signature import Part
from runtime.tokenizer import load_tokenizers

SEED, TIMESTEP = 7, 500
PARTS = ("text", "step", "decode")  # of a request, which is the fourth thing measured
WHOLE = "whole"
ENGINES: Mapping[str, Part] = {"text": "text_encoder", "step": "step", "decode": "vae_decoder"}
Parts = Mapping[str, Callable[[], NDArray[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A model, a request, and how long anything may take.

    size: pixels along one side
    ready_s, run_s, whole_s: a contender's time to open and warm up, for a part, for a request
    headroom_bytes: what must stay free on the machine for contenders to stay open side by side
    """

    name: str
    title: str
    size: int
    ready_s: float
    run_s: float
    whole_s: float
    headroom_bytes: int
    prompt: str = "a red apple, fluent style"
    steps: int = 20
    guidance_scale: float = 5.0

    @classmethod
    def of(cls, name: str) -> "Scenario":
        """Return the scenario of a model's name; raises RequestError when there is none."""
        if name not in SCENARIOS:
            raise RequestError(f"the model {name!r} is not known; choose {', '.join(SCENARIOS)}")
        return SCENARIOS[name]

    def wishes(self) -> dict[str, Any]:
        """Return the request as a pipeline's arguments, here and in diffusers."""
        return {
            "height": self.size,
            "width": self.size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }

    def model(self) -> Path:
        """Return the file or folder that the project's own pipelines load."""
        if self.is_made():
            folder = cache_folder() / "benchmarks"
            folder.mkdir(parents=True, exist_ok=True)
            return write_checkpoint(folder)
        return find_model(self.name)

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
MADE = ("sd15",)


def arrays(scenario: Scenario, model: Model) -> dict[str, NDArray[Any]]:
    """Return what all contenders are given: two rows of ids, latents and the text's states.

    input_ids: (2, n), [uncond, cond]; latents: (1, C, h, w); context: (2, n, D)
    """
    rng = np.random.default_rng(SEED)
    tokenizer = load_tokenizers(model)["text_encoder"]
    input_ids = tokenizer(["", scenario.prompt]).input_ids
    side = scenario.size // model.vae.compression
    latents = rng.standard_normal((1, model.vae.latent_channels, side, side), np.float32)
    width = model.unet.cross_attention_dim
    context = rng.standard_normal((*input_ids.shape, width), np.float32)
    return {"input_ids": input_ids, "latents": latents, "context": context}


def engine_inputs(scenario: Scenario, model: Model) -> dict[Part, dict[str, NDArray[Any]]]:
    """Return the inputs of the project's own engines.

    The step's matrix takes the guided output of the UNet and nothing else, which is what the
    peers compute.
    """
    given = arrays(scenario, model)
    latents, scale = given["latents"], scenario.guidance_scale

    def one(*values: float) -> NDArray[np.float32]:
        return np.array(values, np.float32)

    return {
        "text_encoder": {
            "input_ids": given["input_ids"],
            "extra_embeddings": np.zeros((1, model.unet.cross_attention_dim), np.float32),
        },
        "step": {
            "registers": latents[:, None],
            "matrices": one(0, 1, 0)[None, None],
            "timestep": one(TIMESTEP),
            "input_scale": one(1),
            "context": given["context"][:, None],
            "guidance": one(1 - scale, scale)[:, None],
            "guidance_rescale": one(0),
            "noise": np.zeros_like(latents),
            "mask": np.ones_like(latents[:, :1]),
            "outside": np.zeros((1, 3), np.float32),
        },
        "vae_decoder": {"latents": latents},
    }
