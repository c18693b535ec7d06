"""A model's folder as diffusers writes it: configurations of the parts, and their weights."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from engine.configs.diffusion import (
    AutoencoderConfig,
    IdentityAutoencoderConfig,
    TextEncoderConfig,
    UNetConfig,
)
from engine.configs.identity_autoencoder import IDENTITY_CLASS
from engine.configs.text_encoders import OTHER_TEXT_ENCODERS, T5Config

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
DIFFUSERS = "0.36.0"  # the oldest release that the configurations are written for


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state in float16, whole or not at all."""
    save_whole({name: value.to(torch.float16) for name, value in module.state_dict().items()}, path)


def save_whole(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors, of any shape, as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    whole = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(whole, partial, metadata={"format": "pt"})
    partial.replace(path)


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def model_index(
    scheduler: Mapping[str, object], vae: str, texts: Sequence[str], *, xl: bool = False
) -> dict[str, Any]:
    """Return `model_index.json`; vae: the autoencoder's class; texts: the text encoders."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
    }
    if not xl:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    for name in texts:
        kind = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
        index[name] = ["transformers", kind]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return dict(sorted(index.items()))


def text_encoder_config(config: TextEncoderConfig) -> dict[str, Any]:
    """Return the `config.json` of a text encoder."""
    values = dataclasses.asdict(config)
    for name, (cls, architecture, names) in OTHER_TEXT_ENCODERS.items():
        if isinstance(config, cls):
            theirs = {ours: their for their, ours in names.items()}
            return {
                **{theirs.get(key, key): value for key, value in values.items()},
                "architectures": [architecture],
                "model_type": name,
                "vocab_size": config.vocab_size,
                "eos_token_id": config.vocab_size - 1,
                **_own_fields(config),
            }
    kind = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
    return {
        **values,
        "architectures": [kind],
        "model_type": "clip_text_model",
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": config.vocab_size - 1,
        "projection_dim": config.projection_dim or config.hidden_size,
    }


def _own_fields(config: TextEncoderConfig) -> dict[str, Any]:
    if isinstance(config, T5Config):  # its end of the text has the second id
        return {"feed_forward_proj": config.feed_forward_proj, "eos_token_id": 1}
    return {}


def unet_config(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """Return the `config.json` of a UNet; sample_size: side of the latents."""
    values = dataclasses.asdict(config)
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        values[name] = values[name] or None
    values["time_cond_proj_dim"] = values["time_cond_proj_dim"] or None
    if not values["time_ids"]:
        del values["time_ids"]  # of our own
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        **values,
        "sample_size": sample_size,
    }


def vae_config(
    config: AutoencoderConfig | IdentityAutoencoderConfig, sample_size: int
) -> dict[str, Any]:
    """Return the `config.json` of an autoencoder; sample_size: side of the latents."""
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
