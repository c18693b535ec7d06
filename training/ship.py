"""The trained model as a folder in diffusers' layout: float16 safetensors and configurations."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.configs.diffusion import AutoencoderConfig, IdentityAutoencoderConfig, UNetConfig
from engine.configs.identity_autoencoder import IDENTITY_CLASS
from engine.errors import ModelError
from export.modules.autoencoder import Autoencoder
from export.modules.identity_autoencoder import IdentityAutoencoder
from training.diffusion import MAX_TOKENS, SCHEDULER, Denoiser

LATENT_SIDE = 16  # the pictures are 128 pixels wide and the autoencoder makes 8 of them one
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
DIFFUSERS = "0.36.0"  # the oldest release that the configurations are written for

State = dict[str, torch.Tensor]


def write_model(
    out: Path,
    denoiser: Denoiser,
    autoencoder: Autoencoder | IdentityAutoencoder,
    tokenizer: Path,
    *,
    scheduler: Mapping[str, object] = SCHEDULER,
    sample_size: int = LATENT_SIDE,
) -> None:
    """Write everything that a pipeline needs to `out`; sample_size: side of the latents."""
    vae = _vae_config(autoencoder.config, sample_size)
    write_json(out / "model_index.json", _model_index(scheduler, vae))
    write_json(out / "scheduler" / "scheduler_config.json", scheduler, indent=None)
    write_json(out / "text_encoder" / "config.json", _text_encoder_config(denoiser))
    write_json(out / "unet" / "config.json", _unet_config(denoiser.unet.config, sample_size))
    write_json(out / "vae" / "config.json", vae)
    for name, module in (
        ("text_encoder", denoiser.text_encoder),
        ("unet", denoiser.unet),
        ("vae", autoencoder),
    ):
        write_weights(module, out / name / WEIGHTS[name])
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)


def read_model(folder: Path) -> tuple[State, State]:
    """Return the states of the denoiser and of the autoencoder, float32, to train on from there.

    Raises ModelError when the folder does not hold all of their files.
    """
    try:
        parts = {name: load_file(folder / name / file) for name, file in WEIGHTS.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} is not a model that `python -m training ship` wrote ({error})"
        ) from error
    parts = {
        name: {key: value.float() for key, value in state.items()} for name, state in parts.items()
    }
    denoiser = {
        f"{part}.{name}": value
        for part in ("text_encoder", "unet")
        for name, value in parts[part].items()
    }
    return denoiser, parts["vae"]


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state in float16, whole or not at all."""
    state = {
        name: value.to(torch.float16).contiguous() for name, value in module.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(path)


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def _model_index(scheduler: Mapping[str, object], vae: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae["_class_name"]],
    }


def _text_encoder_config(denoiser: Denoiser) -> dict[str, Any]:
    values = dataclasses.asdict(denoiser.text_encoder.config)
    end = values["eos_token_id"]
    return {
        **values,
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": end - 1,
        "pad_token_id": end,
        "projection_dim": values["hidden_size"],
        "max_position_embeddings": MAX_TOKENS,
    }


def _unet_config(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        values[name] = values[name] or None
    values["time_cond_proj_dim"] = values["time_cond_proj_dim"] or None
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        **values,
        "sample_size": sample_size,
    }


def _vae_config(
    config: AutoencoderConfig | IdentityAutoencoderConfig, sample_size: int
) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    if isinstance(config, IdentityAutoencoderConfig):
        return {"_class_name": IDENTITY_CLASS, **values}
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        **values,
        "shift_factor": values["shift_factor"] or None,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": sample_size * config.compression,
    }
