"""A model in pieces: its UNet and its text encoders as files or folders of their own.

A file of a piece has the names of the original training code or of diffusers and transformers,
under the prefix of a whole model, one of its own, or none. A configuration beside a file counts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from engine.checkpoints.architecture import Stored, clip_config
from engine.checkpoints.component import (
    Component,
    ComponentName,
    assemble,
    diffusers_component,
    refuse_left_over,
)
from engine.checkpoints.diffusers_unet import diffusers_unet_config
from engine.checkpoints.families import Family, family_of
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.parts import PartLayout, open_clip, read_config, unet
from engine.checkpoints.pipeline_index import with_pooled_text
from engine.checkpoints.prediction import Evidence, TrainingFacts, conclude
from engine.checkpoints.single_file import COMPRESSION, FileFields, open_vae
from engine.checkpoints.tiny_autoencoder import open_tiny_decoder
from engine.configs.diffusion import (
    AnyAutoencoder,
    Config,
    TextEncoderConfig,
    UNetConfig,
    read_json,
)
from engine.errors import ModelError

__all__ = [
    "PIECES",
    "ModelFields",
    "added_preview_decoder",
    "is_piece",
    "open_piece",
    "read_pieces",
    "replaced_pieces",
    "replaced_vae",
]

C = TypeVar("C", bound=Config)
PIECES: tuple[ComponentName, ...] = ("text_encoder", "text_encoder_2", "unet")

# What may stand before a piece's names, the longest first.
UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
TEXT_PREFIXES = (
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.0.model.",
    "conditioner.embedders.1.model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoder_2.",
    "text_encoder.",
    "clip_l.transformer.",
    "clip_g.transformer.",
    "clip_l.",
    "clip_g.",
    "",
)
FIRST = "input_blocks.0.0.weight"
UNET_FIRST = (FIRST, "conv_in.weight")
TOKENS = ("token_embedding.weight", "embeddings.token_embedding.weight")
TEXT_FIRST = (*TOKENS, f"text_model.{TOKENS[1]}")
QUICK_WIDTH = 768  # of CLIP's own text encoder; wider ones are OpenCLIP's, with another activation
POOLED = 1280  # width of XL's pooled text


class ModelFields(Protocol):
    """What is asked of a model of which pieces are replaced; see `engine.model.Model`."""

    @property
    def path(self) -> Path:
        """Its folder or file."""

    @property
    def family(self) -> Family:
        """Its family."""

    @property
    def configs(self) -> Mapping[ComponentName, Config]:
        """Its parts' architectures."""

    @property
    def vae(self) -> AnyAutoencoder:
        """The autoencoder's architecture; raises ModelError when it has none."""

    @property
    def find(self) -> Callable[[ComponentName], Component]:
        """What opens its parts."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was concluded of it."""


def read_pieces(
    paths: Mapping[ComponentName, Path], prediction_type: str | None = None
) -> FileFields:
    """Read a model that is all in pieces, less its autoencoder; no weights are read.

    paths: of the UNet, and of the text encoders that it has
    Raises ModelError for what is no such piece, and when they do not belong together.
    """
    configs, components = _open(paths, {})
    config = configs["unet"]
    assert isinstance(config, UNetConfig)
    family = family_of(config, configs)
    facts = _conclude(paths["unet"], config, family, prediction_type)
    variant = facts.variant
    kinds = ", ".join(f"{name} {path}" for name, path in paths.items())
    return {
        "family": family,
        "variant": variant,
        "configs": MappingProxyType(configs),
        "find": components.__getitem__,
        "scheduler": facts.scheduler,
        "sample_size": facts.sample_size,
        "zeros_for_empty_prompt": family.zeros_for_empty_prompt,
        "steps": variant.steps[1] if variant else None,
        "guidance_scale": variant.guidance_scale if variant else None,
        "notes": (f"the model is in pieces of the family {family.title}: {kinds}", *facts.notes),
    }


def replaced_pieces(model: ModelFields, paths: Mapping[ComponentName, Path]) -> dict[str, Any]:
    """Return the fields of a model that are others with these pieces in place of its own.

    Raises ModelError for what is no such piece.
    """
    configs, components = _open(paths, model.configs)
    own = model.find
    fields: dict[str, Any] = {
        "configs": MappingProxyType({**model.configs, **configs}),
        "find": lambda name: components[name] if name in components else own(name),
        "notes": (*model.notes, *(f"the {name} is that of {path}" for name, path in paths.items())),
    }
    unet = configs.get("unet")
    if isinstance(unet, UNetConfig):
        facts = _conclude(paths["unet"], unet, model.family, None)
        if facts.variant:
            fields |= {
                "variant": facts.variant,
                "scheduler": facts.scheduler,
                "steps": facts.variant.steps[1],
                "guidance_scale": facts.variant.guidance_scale,
                "notes": (*fields["notes"], *facts.notes),
            }
    return fields


def replaced_vae(model: ModelFields, path: Path) -> dict[str, Any]:
    """Return the fields of a model that are others with the autoencoder of a file or a folder.

    Raises ModelError for what is none.
    """
    config, component = open_vae(path, model.family.scaling_factor)
    notes = (*model.notes, f"the autoencoder is that of {path}")
    return {**_with_part(model, "vae", config, component), "notes": notes}


def added_preview_decoder(model: ModelFields, path: Path) -> dict[str, Any]:
    """Return the fields of a model that are others with a tiny decoder, of a file or a folder.

    Raises ModelError for what is none, and for one of another family's latents.
    """
    config, component = open_tiny_decoder(path)
    latent = model.vae.latent_channels, model.vae.compression
    if (config.latent_channels, config.compression) != latent:
        raise ModelError(
            f"{path} decodes latents of {config.latent_channels} channels to "
            f"{config.compression} pixels along each side, and those of {model.path} have "
            f"{latent[0]} and {latent[1]}; give a tiny decoder of this model's family"
        )
    return _with_part(model, "preview_decoder", config, component)


def _with_part(
    model: ModelFields, name: ComponentName, config: Config, component: Component
) -> dict[str, Any]:
    own = model.find
    return {
        "configs": MappingProxyType({**model.configs, name: config}),
        "find": lambda asked: component if asked == name else own(asked),
    }


def _open(
    paths: Mapping[ComponentName, Path], own: Mapping[ComponentName, Config]
) -> tuple[dict[ComponentName, Config], dict[ComponentName, Component]]:
    """Open the pieces, text encoders first; own: the architectures of the model's own parts."""
    configs: dict[ComponentName, Config] = {}
    components: dict[ComponentName, Component] = {}
    for name in PIECES:
        if name in paths and name != "unet":
            configs[name], components[name] = _open_text_encoder(name, paths[name])
    if "unet" in paths:
        before = {**own, **configs}
        refiner = "text_encoder_2" in before and "text_encoder" not in before
        configs["unet"], components["unet"] = _open_unet(paths["unet"], before, refiner=refiner)
    return configs, components


def is_piece(weights: Weights) -> bool:
    """Tell whether a file's names are those of a UNet or of text encoders alone."""
    firsts = ((UNET_PREFIXES, UNET_FIRST), (TEXT_PREFIXES, TEXT_FIRST))
    return any(_prefix(weights, *first) is not None for first in firsts)


def open_piece(path: Path) -> tuple[ComponentName, Config, Component]:
    """Open a piece that stands alone, and tell by its names which it is; raises ModelError.

    A projection is that of XL's second text encoder, but beside CLIP's own, whose width tells it.
    """
    weights = open_weights(path)
    if _prefix(weights, UNET_PREFIXES, UNET_FIRST) is not None:
        return ("unet", *_open_unet(path, {}, refiner=False))
    prefix = _prefix(weights, TEXT_PREFIXES, TEXT_FIRST) or ""
    first = (weights.tensors.get(f"{prefix}{token}") for token in TEXT_FIRST)
    clip = any(tensor is not None and tensor.shape[-1:] == (QUICK_WIDTH,) for tensor in first)
    projected = any("text_projection" in name for name in weights)
    name: ComponentName = "text_encoder_2" if projected and not clip else "text_encoder"
    return (name, *_open_text_encoder(name, path))


def _conclude(path: Path, config: UNetConfig, family: Family, asked: str | None) -> TrainingFacts:
    weights = open_weights(path)
    return conclude(
        Evidence(path=path, metadata=weights.metadata, names=weights.tensors),
        family,
        sees_picture=not {"image_conditioning", "edited_image"}.isdisjoint(config.extra_inputs),
        time_condition="timestep_cond" in config.extra_inputs,
        compression=COMPRESSION,
        asked=asked,
    )


def _open_unet(
    path: Path, before: Mapping[ComponentName, Config], *, refiner: bool
) -> tuple[UNetConfig, Component]:
    """Open a UNet alone: a file, or a folder of diffusers; raises ModelError when it is none."""
    weights = open_weights(path)
    prefix = _prefix(weights, UNET_PREFIXES, UNET_FIRST)
    if prefix is None:
        raise ModelError(
            f"{path} holds no UNet: it has no {FIRST} and no conv_in.weight; give the file or "
            "folder of a Stable Diffusion's UNet"
        )
    weights = _under(weights, prefix)
    stored = _stored(path, weights)
    if "conv_in.weight" in weights:
        pooling = before.get("text_encoder_2")
        pooled = pooling.symbols()["P"] if pooling else POOLED
        config = _stated(path, UNetConfig)
        if config is None:
            config = diffusers_unet_config(stored, pooled=pooled, refiner=refiner)
        elif pooling and "text_embeds" in config.extra_inputs:
            config = with_pooled_text(config, pooled)
        return config, diffusers_component(path, weights, config)
    projection = weights.tensors.get("middle_block.1.proj_in.weight")
    linear = len(projection.shape) == 2 if projection else "label_emb" in stored
    return _in_original_layout(
        "unet", unet(linear=linear, refiner=refiner), stored, weights, before
    )


def _open_text_encoder(name: ComponentName, path: Path) -> tuple[TextEncoderConfig, Component]:
    """Open a text encoder alone: a file, or a folder of transformers; raises ModelError."""
    weights = open_weights(path)
    prefix = _prefix(weights, TEXT_PREFIXES, TEXT_FIRST)
    if prefix is None:
        raise ModelError(
            f"{path} holds no text encoder: it has no {' and no '.join(TEXT_FIRST)}; give the file "
            "or folder of a CLIP or OpenCLIP text encoder"
        )
    weights = _under(weights, prefix)
    stored, pooled = _stored(path, weights), name == "text_encoder_2"
    if TOKENS[0] in weights:
        return _in_original_layout(name, open_clip(("",), pooled=pooled), stored, weights, {})
    config = _stated(path, TextEncoderConfig) or _transformers_config(
        _stored(path, _under(weights, "text_model.")), stored, pooled=pooled
    )
    return config, diffusers_component(path, weights, config)


def _in_original_layout(
    name: ComponentName,
    layout: PartLayout[C],
    stored: Stored,
    weights: Weights,
    before: Mapping[ComponentName, Config],
) -> tuple[C, Component]:
    """Open a piece with the names of the original training code; none may be left over."""
    config = read_config(name, layout, stored, before)
    component = assemble(stored.path, weights, config, layout.sources(config, stored))
    unused = re.escape(layout.unused(config, stored)) + ".+" if layout.unused else None
    refuse_left_over(stored.path, weights, component.used(), unused)
    return config, component


def _transformers_config(text_model: Stored, stored: Stored, *, pooled: bool) -> TextEncoderConfig:
    """Read a text encoder's architecture off transformers' names; widths tell the activation."""
    config = clip_config(text_model)
    projection = stored.size("text_projection.weight") if pooled else 0
    act = "gelu" if pooled or config.hidden_size > QUICK_WIDTH else config.hidden_act
    return replace(config, hidden_act=act, projection_dim=projection)


def _prefix(weights: Weights, prefixes: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    held = (p for p in prefixes if any(f"{p}{name}" in weights for name in names))
    return next(held, None)


def _under(weights: Weights, prefix: str) -> Weights:
    """Keep what stands under a prefix, or all where nothing does, without it."""
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    return replace(weights, tensors=MappingProxyType(tensors)) if tensors else weights


def _stored(path: Path, weights: Weights) -> Stored:
    return Stored.of(path, "", {name: t.shape for name, t in weights.tensors.items()})


def _stated(path: Path, kind: type[C]) -> C | None:
    """Read the configuration in a piece's folder, or beside its file; None where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        return kind.from_dict(read_json(file))
    except ModelError:
        if path.is_dir():
            raise
        return None  # of another part, or of a program that keeps its own there
