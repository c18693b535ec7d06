"""The trained model as a folder in diffusers' layout: float16 safetensors and configurations."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import ModelError
from export.modules.autoencoder import Autoencoder
from export.modules.identity_autoencoder import IdentityAutoencoder
from training.diffusers_folder import (
    WEIGHTS,
    model_index,
    text_encoder_config,
    unet_config,
    vae_config,
    write_json,
    write_weights,
)
from training.diffusion import SCHEDULER, Denoiser
from training.text_encoders import CLASSES

LATENT_SIDE = 16  # the pictures are 128 pixels wide and the autoencoder makes 8 of them one
SHIPPED = ("text_encoder", "unet", "vae")

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
    vae = vae_config(autoencoder.config, sample_size)
    index = model_index(scheduler, vae["_class_name"], ["text_encoder"])
    text = text_encoder_config(denoiser.text)
    if text["model_type"] != "clip_text_model":
        index["text_encoder"] = ["transformers", text["architectures"][0]]
        index["tokenizer"] = ["transformers", CLASSES[text["model_type"]]]
    write_json(out / "model_index.json", index)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler, indent=None)
    write_json(out / "text_encoder" / "config.json", text)
    write_json(out / "unet" / "config.json", unet_config(denoiser.unet.config, sample_size))
    write_json(out / "vae" / "config.json", vae)
    modules = (denoiser.text_encoder, denoiser.unet, autoencoder)
    for name, module in zip(SHIPPED, modules, strict=True):
        write_weights(module, out / name / WEIGHTS[name])
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)


def read_model(folder: Path) -> tuple[State, State]:
    """Return the states of the denoiser and of the autoencoder, float32, to train on from there.

    Raises ModelError when the folder does not hold all of their files.
    """
    try:
        parts = {name: load_file(folder / name / WEIGHTS[name]) for name in SHIPPED}
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
