"""A Stable Diffusion that was trained on, as a folder in diffusers' layout."""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.configs.diffusion import AutoencoderConfig
from engine.model import Model
from runtime.conditioning.tokenizer import PAD_TOKENS
from runtime.conditioning.vocabulary import Vocabulary
from training.diffusers_folder import (
    WEIGHTS,
    model_index,
    save_whole,
    text_encoder_config,
    unet_config,
    vae_config,
    write_json,
    write_weights,
)
from training.stable_diffusion import StableDiffusion
from training.vocabulary import write_tokenizer

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.msgpack", "*.ckpt")


def write_tuned(out: Path, model: Model, trained: StableDiffusion, *, text_encoder: bool) -> None:
    """Write a model that was trained on: a folder's files with new weights, or a file as a folder.

    text_encoder: whether the text encoders were trained too; what was not is written as it was
    """
    parts: dict[str, nn.Module] = {"unet": trained.unet}
    if text_encoder or not model.path.is_dir():
        parts = trained.parts()
    if model.path.is_dir():
        _copy(model.path, out, set(parts))
    else:
        _write_configurations(out, model)
        vae = {n: torch.from_numpy(np.array(a)) for n, a in model.component("vae").items()}
        save_whole(vae, out / "vae" / WEIGHTS["vae"])
    for name, module in parts.items():
        write_weights(module, out / name / WEIGHTS[name])


def _copy(source: Path, out: Path, without: set[str]) -> None:
    """Copy a model's folder, less the weights of some parts."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        stale = inner.parts[0] in without and any(path.match(kind) for kind in WEIGHT_FILES)
        if path.is_file() and not stale:
            (out / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inner)


def _write_configurations(out: Path, model: Model) -> None:
    vae, texts = model.vae, model.text_encoders
    assert isinstance(vae, AutoencoderConfig)
    scheduler = {"_class_name": "DDIMScheduler", **model.scheduler}
    index = model_index(
        scheduler, "AutoencoderKL", list(texts), xl="time_ids" in model.unet.extra_inputs
    )
    if model.zeros_for_empty_prompt:
        index["force_zeros_for_empty_prompt"] = True
    write_json(out / "model_index.json", index)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler, indent=None)
    write_json(out / "unet" / "config.json", unet_config(model.unet, model.sample_size))
    write_json(out / "vae" / "config.json", vae_config(vae, model.sample_size))
    for name, config in texts.items():
        write_json(out / name / "config.json", text_encoder_config(config))
        pad = PAD_TOKENS[config.hidden_act]
        vocabulary = Vocabulary.clip(pad)
        folder = out / name.replace("text_encoder", "tokenizer")
        write_tokenizer(
            folder, dict(vocabulary.ids), vocabulary.merges, vocabulary.max_length, pad_token=pad
        )
