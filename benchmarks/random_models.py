"""Published models of random weights in float16, as folders in diffusers' layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.diffusers_folder import write_folder
from benchmarks.load import random_tensor
from engine.checkpoints.families import Family
from engine.checkpoints.families.sd import CLIP_L, OPEN_CLIP_H, SD2, SD2_FAMILY, SDXS_OF_SD2
from engine.checkpoints.families.xl import OPEN_CLIP_G, XL, XL_FAMILY
from engine.configs.diffusion import (
    XL_SCALING_FACTOR,
    AutoencoderConfig,
    Config,
    TinyAutoencoderConfig,
    UNetConfig,
)
from engine.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """What a published model is, without its weights; sample_size: side of its latents."""

    family: Family
    configs: Mapping[Any, Config]
    scheduler: Mapping[str, Any]
    sample_size: int


def _of_one_step(unet: UNetConfig, vae: Config) -> RandomModel:
    """Return a model distilled to one step, with the text encoder of Stable Diffusion 2.1."""
    return RandomModel(
        family=SD2_FAMILY,
        configs={"text_encoder": OPEN_CLIP_H, "unet": unet, "vae": vae},
        scheduler={
            **SD2_FAMILY.scheduler,
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
        },
        sample_size=64,
    )


RANDOM_MODELS: Mapping[str, RandomModel] = {
    "sdturbo": _of_one_step(SD2, TinyAutoencoderConfig()),
    "sdturbo_full": _of_one_step(SD2, AutoencoderConfig()),
    "sdxs": _of_one_step(SDXS_OF_SD2, TinyAutoencoderConfig()),
    "sd21": RandomModel(
        family=SD2_FAMILY,
        configs={"text_encoder": OPEN_CLIP_H, "unet": SD2, "vae": AutoencoderConfig()},
        scheduler={**SD2_FAMILY.scheduler, "prediction_type": "v_prediction"},
        sample_size=96,
    ),
    "xl": RandomModel(
        family=XL_FAMILY,
        configs={
            "text_encoder": CLIP_L,
            "text_encoder_2": OPEN_CLIP_G,
            "unet": XL,
            "vae": AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),
        },
        scheduler=XL_FAMILY.scheduler,
        sample_size=128,
    ),
}


def write_random(name: str, folder: Path) -> Path:
    """Write one of these models, unless it is there; returns its folder."""
    chosen = RANDOM_MODELS[name]
    pool = np.random.default_rng(0).standard_normal(2**25).astype(np.float32)

    def find(part: Any) -> Any:
        return random_tensors(chosen.configs[part], pool)

    return write_folder(
        Model(
            path=folder / f"{name}-float16",
            family=chosen.family,
            configs=MappingProxyType(chosen.configs),
            find=find,
            scheduler=chosen.scheduler,
            sample_size=chosen.sample_size,
            zeros_for_empty_prompt=chosen.family.zeros_for_empty_prompt,
        )
    )


def random_tensors(config: Config, pool: NDArray[np.float32]) -> dict[str, NDArray[np.float16]]:
    """Draw every tensor of a part, by name; pool: (n,) float32, as of `random_tensor`."""
    return {name: random_tensor(name, s, pool) for name, s in config.tensor_shapes().items()}
