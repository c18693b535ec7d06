"""A whole model in one file, in the layout of the original training code; an autoencoder alone."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

from engine.checkpoints.architecture import Stored, autoencoder_config
from engine.checkpoints.component import (
    Component,
    ComponentName,
    assemble,
    diffusers_component,
    refuse_left_over,
    shown,
)
from engine.checkpoints.families import Family, find_family
from engine.checkpoints.families.base import SCALING_FACTOR, Variant
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.formats.torch_archive import UNREAD
from engine.checkpoints.likeness import likeness
from engine.checkpoints.parts import (
    AVERAGED,
    UNET,
    Shapes,
    autoencoder,
    averaged,
    read_config,
)
from engine.checkpoints.prediction import Evidence, TrainingFacts, conclude
from engine.checkpoints.tiny_autoencoder import (
    has_tiny_decoder,
    open_tiny_autoencoder,
)
from engine.checkpoints.unsupported import refuse_foreign
from engine.configs.base import read_json
from engine.configs.diffusion import AutoencoderConfig, Config, TinyAutoencoderConfig
from engine.configs.tiny_autoencoder import TINY_CLASS
from engine.errors import MissingTensorError, ModelError

__all__ = ["FileFields", "open_vae", "read_file"]

COMPRESSION = 8  # of the autoencoders of all families, where a file has none


class FileFields(TypedDict):
    """What a file says of the model in it; the fields of `engine.model.Model` of these names.

    configs, find: of the parts that the file has. XL's text_encoder is CLIP's and its
        text_encoder_2 OpenCLIP's; the refiner has the second alone
    """

    family: Family
    variant: Variant | None
    configs: Mapping[ComponentName, Config]
    find: Callable[[ComponentName], Component]
    scheduler: Mapping[str, Any]
    sample_size: int
    zeros_for_empty_prompt: bool
    steps: int | None
    guidance_scale: float | None
    notes: tuple[str, ...]


def read_file(path: Path, prediction_type: str | None = None) -> FileFields:
    """Read what a file is, and check that every tensor of it has its place; no weights are read.

    prediction_type: "epsilon", "v_prediction" or "sample", where it is not to be guessed
    Raises ModelError when the file is damaged or of another architecture, and when a tensor is
    left over or of a wrong shape; MissingTensorError when one is missing.
    """
    weights = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    refuse_foreign(path, shapes)
    family = find_family(path, shapes)
    try:
        configs, components, notes = _parts(path, weights, shapes, family)
    except MissingTensorError as error:
        problem, semicolon, advice = str(error).rpartition("; ")
        raise MissingTensorError(
            f"{problem}{semicolon}{likeness(path, shapes, family)}: {advice}"
        ) from error
    conclusion = _conclude(path, weights, family, configs, prediction_type)
    variant = conclusion.variant
    return {
        "family": family,
        "variant": variant,
        "configs": MappingProxyType(configs),
        "find": components.__getitem__,
        "scheduler": conclusion.scheduler,
        "sample_size": conclusion.sample_size,
        "zeros_for_empty_prompt": family.zeros_for_empty_prompt,
        "steps": variant.steps[1] if variant else None,
        "guidance_scale": variant.guidance_scale if variant else None,
        "notes": (*notes, *conclusion.notes),
    }


def _parts(
    path: Path, weights: Weights, shapes: Shapes, family: Family
) -> tuple[dict[ComponentName, Config], dict[ComponentName, Component], list[str]]:
    """Read off the architectures, and find every tensor; also say what was concluded."""
    configs: dict[ComponentName, Config] = {}
    components: dict[ComponentName, Component] = {}
    notes = [f"{path.name} is of the family {family.title}"]
    notes += weights.notes
    for name, text in weights.metadata.items():
        if text.startswith(UNREAD):
            notes.append(f"its {shown(name, 60)} is {shown(text)}, and nothing of it is run")
    used: set[str] = set()
    unused = None
    for part, layout in family.parts.items():
        prefix = layout.prefix(shapes)
        if prefix is None:
            continue
        stored = Stored.of(path, prefix, shapes)
        config = read_config(part, layout, stored, configs)
        sources = layout.sources(config, stored)
        configs[part] = config
        component = components[part] = assemble(path, weights, config, sources)
        used |= component.used()
        if layout.unused:
            unused = re.escape(prefix + layout.unused(config, stored)) + ".+"
        if part == "unet" and any(name.startswith(AVERAGED) for name in shapes):
            means = averaged(shapes, config, sources)
            if means:
                components[part] = assemble(path, weights, config, means)
            notes.append(
                "its UNet's averaged weights (EMA) are used"
                if means
                else "its averaged weights (EMA) are incomplete and not used"
            )
    refuse_left_over(path, weights, used, unused)
    return configs, components, notes


def _conclude(
    path: Path,
    weights: Weights,
    family: Family,
    configs: Mapping[ComponentName, Config],
    asked: str | None,
) -> TrainingFacts:
    unet, vae = configs["unet"], configs.get("vae")
    return conclude(
        Evidence(path=path, metadata=weights.metadata, names=weights.tensors),
        family,
        sees_picture=not {"image_conditioning", "edited_image"}.isdisjoint(unet.extra_inputs),
        time_condition="timestep_cond" in unet.extra_inputs,
        compression=vae.compression if vae else COMPRESSION,
        asked=asked,
    )


def open_vae(
    path: Path, scaling_factor: float = SCALING_FACTOR
) -> tuple[AutoencoderConfig | TinyAutoencoderConfig, Component]:
    """Open an autoencoder alone: a file in either layout, a whole model's, or diffusers' folder.

    scaling_factor: of the model it is for; a file does not say, a folder's config.json does, and a
        tiny one's latents are scaled
    Raises ModelError when it is no autoencoder, and for any tensor that has no place.
    """
    weights = open_weights(path)
    told = read_json(path / "config.json").get("_class_name") if path.is_dir() else None
    if told == TINY_CLASS or (told is None and has_tiny_decoder(weights.tensors)):
        return open_tiny_autoencoder(path)
    if path.is_dir():
        config = AutoencoderConfig.load(path)
        return config, diffusers_component(path, weights, config)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    layout = autoencoder(scaling_factor)
    prefix = layout.prefix(shapes) or ""
    stored = Stored.of(path, prefix, shapes)
    if "encoder" not in stored:
        raise ModelError(
            f"{path} holds no autoencoder of Stable Diffusion: it has no "
            f"{prefix}encoder.conv_in.weight; give a VAE's file or folder"
        )
    config = autoencoder_config(stored, scaling_factor=scaling_factor)
    if "encoder.mid_block" in stored:
        return config, diffusers_component(path, weights, config)
    sources = layout.sources(config, stored)
    component = assemble(path, weights, config, averaged(shapes, config, sources) or sources)
    held = [name for name in shapes if name.startswith(prefix) and not name.startswith(UNET)]
    refuse_left_over(path, held, component.used() | {source.name for source in sources.values()})
    return config, component
