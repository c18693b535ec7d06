"""A folder's `model_index.json`: whether its parts are an ordinary Stable Diffusion's.

What counts is which parts there are, not which of diffusers' pipelines saved them: ControlNet, PAG
and others run with the same UNet, autoencoder and text encoders.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.tensors import short
from engine.configs.diffusion import UNetConfig
from engine.errors import ModelError

__all__ = ["check_index", "latent_side", "with_pooled_text"]

# Classes of the parts that a model is made of.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
}
# Parts that change nothing where they are left out; what a model cannot do without is none of them.
BESIDE = (
    *("scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker"),
    *("image_encoder", "controlnet", "adapter", "preview_decoder", "watermarker"),
)


def check_index(path: Path, index: Mapping[str, Any]) -> list[str]:
    """Return what is said of a folder that an unknown pipeline saved.

    path: of the file
    Raises ModelError when a part is of another class than a Stable Diffusion's.
    """
    kind = index.get("_class_name")
    if isinstance(kind, list) and len(kind) == 2:  # a file of code beside it, and its class
        kind = kind[1]
    parts = {
        name: value[1]
        for name, value in index.items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and isinstance(value[1], str)
    }
    for name, allowed in CLASSES.items():
        if name in parts and parts[name] not in allowed:
            raise ModelError(
                f"{path} names the pipeline {short(kind)}, whose {name} is a {short(parts[name])}; "
                f"supported is {' or '.join(allowed)}: use a Stable Diffusion 1.x, 2.x or XL model"
            )
    strange = [name for name in parts if name not in CLASSES and name not in BESIDE]
    missing = [name for name in ("unet", "vae") if name not in parts]
    if missing or strange or not isinstance(kind, str):
        what = "has no " + " and no ".join(missing) if missing else "is none"
        if strange:
            what = f"has a {short(strange[0])}"
        raise ModelError(
            f"{path} names the pipeline {short(kind)}, which {what}; supported are folders whose "
            "parts are an ordinary Stable Diffusion's: use a Stable Diffusion 1.x, 2.x or XL model"
        )
    left = [name for name in ("controlnet", "adapter", "image_encoder") if name in parts]
    unused = f", without its {', '.join(left)}" if left else ""
    return [f"the folder was saved by {short(kind)}; its parts draw from texts{unused}"]


def latent_side(path: Path, sample_size: object) -> int:
    """Return the side of the latents in training; of a pair of sides, the larger.

    path: of the UNet's configuration. Raises ModelError for what is neither a number nor a pair.
    """
    pair = sample_size if isinstance(sample_size, list) else [sample_size]
    sides = [side for side in pair if type(side) is int and side > 0]
    if len(sides) != len(pair) or len(pair) not in (1, 2):
        raise ModelError(
            f"{path} has sample_size {short(sample_size)}; a whole number of latents along one "
            "side, or a pair of them, is expected"
        )
    return max(sides)


def with_pooled_text(unet: UNetConfig, pooled: int) -> UNetConfig:
    """Return the architecture of XL's UNet, which is told a pooled text of this width.

    What else it is told, 6 sizes or 4 and a score, fills what the text leaves of a layer's input.
    Raises ModelError when it cannot.
    """
    left = unet.projection_class_embeddings_input_dim - pooled
    count, rest = divmod(left, unet.addition_time_embed_dim)
    if rest or count not in (5, 6):
        raise ModelError(
            f"projection_class_embeddings_input_dim leaves {left} beside a pooled text of "
            f"{pooled}; 5 or 6 times addition_time_embed_dim ({unet.addition_time_embed_dim}) is "
            "expected: use parts of one model"
        )
    return unet if count == unet.addition_time_ids else replace(unet, time_ids=count)
