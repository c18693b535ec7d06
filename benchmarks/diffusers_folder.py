"""A model as a folder in diffusers' layout, so that peers load the same weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.configs.control_net import ControlNetConfig
from engine.configs.diffusion import (
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyAutoencoderConfig,
    UNetConfig,
)
from engine.model import Model
from runtime.conditioning.tokenizer import PAD_TOKENS
from runtime.conditioning.vocabulary import Vocabulary

KL, TINY = "AutoencoderKL", "AutoencoderTiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS = "0.36.0"  # the oldest release that the configurations are written for
# Numbers that are 0 here and null there where the UNet has no such layer.
ABSENT = (
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)


def write_folder(model: Model) -> Path:
    """Write a model as diffusers and transformers do, unless it is there."""
    from safetensors.numpy import save_file

    folder = model.path.with_suffix("")
    if (folder / "model_index.json").is_file():
        return folder
    for name, config in _configs(model).items():
        _write_json(folder / name / "config.json", config)
        file = "model.safetensors" if name in model.text_encoders else WEIGHTS
        tensors = {key: np.ascontiguousarray(value) for key, value in model.find(name).items()}
        save_file(tensors, folder / name / file, metadata={"format": "pt"})
    for name, text in model.text_encoders.items():
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        _write_tokenizer(tokenizer, PAD_TOKENS[text.hidden_act])
    scheduler = {**model.scheduler, "_class_name": "DDIMScheduler", "clip_sample": False}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _index(model))
    return folder


def write_control_net(
    config: ControlNetConfig, tensors: Mapping[str, NDArray[Any]], folder: Path
) -> None:
    """Write a ControlNet as diffusers does, its configuration last.

    tensors: by the names and in the shapes that the configuration says
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", _unet(config, "ControlNetModel"))


def _index(model: Model) -> dict[str, Any]:
    """Say which classes the parts are of."""
    index: dict[str, Any] = {
        "_class_name": f"{model.family.pipelines[0]}Pipeline",
        "_diffusers_version": DIFFUSERS,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", TINY if isinstance(model.vae, TinyAutoencoderConfig) else KL],
        "feature_extractor": [None, None],
    }
    for name, config in model.text_encoders.items():
        index[name] = ["transformers", _text_class(config)]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if model.family.pipelines == ("StableDiffusionXL",):
        return {
            **index,
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": model.zeros_for_empty_prompt,
        }
    return {**index, "safety_checker": [None, None], "requires_safety_checker": False}


def _configs(model: Model) -> dict[Any, dict[str, Any]]:
    side = model.sample_size
    return {
        **{name: _text(config) for name, config in model.text_encoders.items()},
        "unet": {**_unet(model.unet, "UNet2DConditionModel"), "sample_size": side},
        "vae": _vae(model.config("vae_decoder"), side),
    }


def _unet(config: UNetConfig, kind: str) -> dict[str, Any]:
    absent = {name: None for name in ABSENT if not getattr(config, name)}
    return {**asdict(config), **absent, "_class_name": kind, "_diffusers_version": DIFFUSERS}


def _text_class(config: TextEncoderConfig) -> str:
    return "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"


def _text(config: TextEncoderConfig) -> dict[str, Any]:
    return {
        **asdict(config),
        "architectures": [_text_class(config)],
        "model_type": "clip_text_model",
        "projection_dim": config.projection_dim or config.hidden_size,
    }


def _vae(config: Config, side: int) -> dict[str, Any]:
    if isinstance(config, TinyAutoencoderConfig):
        return {**asdict(config), "_class_name": TINY, "_diffusers_version": DIFFUSERS}
    assert isinstance(config, AutoencoderConfig)  # no model that is measured draws in pixels
    levels = len(config.block_out_channels)
    return {
        **asdict(config),
        "_class_name": KL,
        "_diffusers_version": DIFFUSERS,
        "shift_factor": config.shift_factor or None,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": side * config.compression,
    }


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    vocabulary = Vocabulary.clip(pad_token)
    _write_json(folder / "vocab.json", dict(vocabulary.ids))
    merges = "\n".join(f"{left} {right}" for left, right in vocabulary.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": vocabulary.max_length}
    tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    _write_json(folder / "tokenizer_config.json", {**config, **tokens})


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
