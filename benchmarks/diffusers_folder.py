"""A model of one file as a folder in diffusers' layout, so that peers load the same weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.model import Model
from runtime.vocabulary import Vocabulary

DIFFUSERS = "0.36.0"  # the oldest release that the configurations are written for
# Numbers that are 0 here and null there where the UNet has no such layer.
ABSENT = (
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)


def write_folder(model: Model) -> Path:
    """Write a model that is one file as diffusers and transformers do, unless it is there."""
    from safetensors.numpy import save_file

    folder = model.path.with_suffix("")
    if (folder / "model_index.json").is_file():
        return folder
    configs, weights = _configs(model), "diffusion_pytorch_model.safetensors"
    for name, config in configs.items():
        _write_json(folder / name / "config.json", config)
        file = "model.safetensors" if name == "text_encoder" else weights
        tensors = {key: np.ascontiguousarray(value) for key, value in model.find(name).items()}
        save_file(tensors, folder / name / file, metadata={"format": "pt"})
    _write_tokenizer(folder / "tokenizer")
    scheduler = {**model.scheduler, "_class_name": "DDIMScheduler", "clip_sample": False}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        name: ["transformers" if name.startswith("t") else "diffusers", kind]
        for name, kind in (
            ("scheduler", "DDIMScheduler"),
            ("text_encoder", "CLIPTextModel"),
            ("tokenizer", "CLIPTokenizer"),
            ("unet", "UNet2DConditionModel"),
            ("vae", "AutoencoderKL"),
        )
    }
    index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": DIFFUSERS}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write_json(folder / "model_index.json", {**index, "requires_safety_checker": False})
    return folder


def _configs(model: Model) -> dict[Any, dict[str, Any]]:
    side = model.sample_size
    text, vae = asdict(model.text_encoders["text_encoder"]), asdict(model.vae)
    unet = asdict(model.unet) | {name: None for name in ABSENT if not getattr(model.unet, name)}
    levels = len(model.vae.block_out_channels)
    return {
        "text_encoder": {
            **text,
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "projection_dim": text["hidden_size"],
        },
        "unet": {
            **unet,
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": DIFFUSERS,
            "sample_size": side,
        },
        "vae": {
            **vae,
            "_class_name": "AutoencoderKL",
            "_diffusers_version": DIFFUSERS,
            "shift_factor": vae["shift_factor"] or None,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "sample_size": side * model.vae.compression,
        },
    }


def _write_tokenizer(folder: Path) -> None:
    vocabulary = Vocabulary.clip("<|endoftext|>")
    _write_json(folder / "vocab.json", dict(vocabulary.ids))
    merges = "\n".join(f"{left} {right}" for left, right in vocabulary.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": vocabulary.max_length}
    names = ("pad_token", "eos_token", "unk_token")
    tokens = dict.fromkeys(names, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
    _write_json(folder / "tokenizer_config.json", {**config, **tokens})


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
