"""A whole model in one file: where its parts are, which family they make, what they are made of."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from engine.checkpoints.architecture import (
    CONDITIONS,
    Stored,
    autoencoder_config,
    clip_config,
    open_clip_config,
    unet_config,
)
from engine.checkpoints.component import ComponentName, Source, fits
from engine.checkpoints.families import FAMILIES, Family, FamilyName
from engine.checkpoints.ldm_names import (
    Sources,
    autoencoder_sources,
    open_clip_sources,
    text_encoder_sources,
    unet_sources,
)
from engine.configs.base import Shape
from engine.configs.diffusion import AutoencoderConfig, Config, TextEncoderConfig, UNetConfig
from engine.errors import ModelError

__all__ = ["Shapes", "averaged", "find_family", "find_parts", "read_config", "sources_of"]

Shapes = Mapping[str, Shape]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
AVERAGED = "model_ema."  # what follows is the name under `model.` without its dots
OPEN_CLIP = ("cond_stage_model.model.",)
XL_OPEN_CLIP = ("conditioner.embedders.1.model.",)
REFINER_OPEN_CLIP = ("conditioner.embedders.0.model.",)
CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
XL_CLIP = (
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.0.transformer.",
)

# Where the text encoders of each family are; the first prefix that a file has counts.
TEXT_ENCODER_PLACES: Mapping[FamilyName, Mapping[ComponentName, tuple[str, ...]]] = (
    MappingProxyType(
        {
            "sd1": {"text_encoder": CLIP},
            "sd2": {"text_encoder": OPEN_CLIP},
            "xl": {"text_encoder": XL_CLIP, "text_encoder_2": XL_OPEN_CLIP},
            "xl-refiner": {"text_encoder_2": REFINER_OPEN_CLIP},
        }
    )
)
POOLED = 1280  # width of XL's pooled text, where its encoder is not in the file
REFINER_CONTEXT = 1280  # what the refiner attends to; XL attends to 2048


def find_family(path: Path, shapes: Shapes) -> Family:
    """Tell the family: XL is told sizes, its refiner by OpenCLIP alone; 2 reads by OpenCLIP.

    Without a text encoder the width of the text, and linear projections, tell as much.
    """
    unet = Stored.of(path, UNET, shapes)
    context = unet.size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1)
    projection = len(shapes.get(f"{UNET}middle_block.1.proj_in.weight", ()))
    encoders = {
        name: _first(shapes, places)
        for name, places in (("clip", CLIP), ("open_clip", OPEN_CLIP), ("xl", XL_OPEN_CLIP))
    }
    if "label_emb" in unet:
        alone = encoders["xl"] is None and _first(shapes, XL_CLIP) is None
        refiner = _first(shapes, REFINER_OPEN_CLIP) is not None or context == REFINER_CONTEXT
        return FAMILIES["xl-refiner" if alone and refiner else "xl"]
    if encoders["open_clip"] is None and (encoders["clip"] is not None or projection == 4):
        return FAMILIES["sd1"]
    return FAMILIES["sd2"]


def find_parts(shapes: Shapes, family: Family) -> dict[ComponentName, str]:
    """Return the prefix of each part that a file has, text encoders first."""
    places = {**TEXT_ENCODER_PLACES[family.name], "unet": (UNET,), "vae": (VAE,)}
    found = {name: _first(shapes, prefixes) for name, prefixes in places.items()}
    return {name: prefix for name, prefix in found.items() if prefix is not None}


def _first(shapes: Shapes, prefixes: tuple[str, ...]) -> str | None:
    return next((p for p in prefixes if any(name.startswith(p) for name in shapes)), None)


def read_config(part: ComponentName, stored: Stored, family: Family, pooled: int | None) -> Config:
    """Read off a part's architecture; raises ModelError naming the file.

    pooled: width of the projected text, if its encoder is there
    """
    try:
        if part == "unet":
            return unet_config(
                stored,
                linear=family.name != "sd1",
                pooled=pooled or POOLED,
                refiner=family.name == "xl-refiner",
            )
        if part == "vae":
            return autoencoder_config(stored, scaling_factor=family.scaling_factor)
        if stored.prefix.endswith(".model."):
            return open_clip_config(stored, pooled=part == "text_encoder_2")
        return clip_config(stored)
    except ModelError as error:
        if str(stored.path) in str(error):
            raise
        raise ModelError(f"{stored.path} has tensors of no {part} that runs: {error}") from error


def sources_of(config: Config, prefix: str, shapes: Shapes) -> Sources:
    """Say where each tensor of a part is in a file that keeps the part under this prefix."""
    if isinstance(config, TextEncoderConfig) and not prefix.endswith(".model."):
        return text_encoder_sources(config, prefix)
    table: Callable[..., Sources] = open_clip_sources
    if isinstance(config, UNetConfig):
        table = unet_sources
    elif isinstance(config, AutoencoderConfig):
        table = autoencoder_sources
    sources = {
        name: replace(source, name=prefix + source.name) for name, source in table(config).items()
    }
    for other in CONDITIONS:
        if isinstance(config, UNetConfig) and prefix + other in shapes:
            sources["time_embedding.cond_proj.weight"] = Source(name=prefix + other)
    return sources


def averaged(shapes: Shapes, config: Config, sources: Sources) -> Sources | None:
    """Say where the running means of a UNet's weights are; None unless all of them are there."""
    expected, means = config.tensor_shapes(), {}
    for name, source in sources.items():
        mean = AVERAGED + source.name.removeprefix("model.").replace(".", "")
        if mean not in shapes or not fits(source.shape(shapes[mean]), expected[name]):
            return None
        means[name] = replace(source, name=mean)
    return means
