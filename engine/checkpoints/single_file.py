"""A whole model in one file, in the layout of the original training code; an autoencoder alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from engine.checkpoints.architecture import Stored, autoencoder_config
from engine.checkpoints.component import (
    Component,
    ComponentName,
    assemble,
    diffusers_component,
    refuse_left_over,
)
from engine.checkpoints.families import Family, Variant
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.parts import (
    AVERAGED,
    TEXT_ENCODERS,
    UNET,
    VAE,
    Shapes,
    averaged,
    find_family,
    find_parts,
    read_config,
    sources_of,
)
from engine.checkpoints.prediction import Conclusion, Told, conclude
from engine.checkpoints.unsupported import foreign_channels, refuse_foreign
from engine.configs.diffusion import AutoencoderConfig, Config, TextEncoderConfig, UNetConfig
from engine.errors import ModelError

__all__ = ["Checkpoint", "open_vae"]

SCALING_FACTOR = 0.18215  # of the autoencoders of Stable Diffusion 1 and 2
ADVICE: Mapping[ComponentName, str] = MappingProxyType(
    {
        "text_encoder": "use a file of the whole model",
        "text_encoder_2": "use a file of the whole model",
        "unet": "use a file of the whole model",
        "vae": "give one with --vae",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What one file holds; no weights are read yet.

    configs: the architectures of the parts that the file has. XL's text_encoder is CLIP's and its
        text_encoder_2 OpenCLIP's; the refiner has the second alone
    components: the parts' weights under their graphs' names
    variant: of a model distilled to few steps
    scheduler: a `scheduler_config.json`
    sample_size: side of the latents in training
    notes: what was concluded from more than the weights, and why, a sentence each
    """

    path: Path
    weights: Weights
    family: Family
    inpainting: bool
    variant: Variant | None
    configs: Mapping[ComponentName, Config]
    components: Mapping[ComponentName, Component]
    scheduler: Mapping[str, Any]
    sample_size: int
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, prediction_type: str | None = None) -> Self:
        """Read what a file is, and check that every tensor of it has its place.

        prediction_type: "epsilon", "v_prediction" or "sample", where it is not to be guessed
        Raises ModelError when the file is damaged or of another architecture, and when a tensor
        is missing, left over or of a wrong shape.
        """
        weights = open_weights(path)
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        refuse_foreign(path, shapes)
        family = find_family(path, shapes)
        configs, components, notes = _parts(path, weights, shapes, family)
        _check_widths(path, family, configs)
        conclusion = _conclude(path, weights, family, configs, prediction_type)
        return cls(
            path=path,
            weights=weights,
            family=family,
            inpainting=_is_inpainting(configs["unet"]),
            variant=conclusion.variant,
            configs=MappingProxyType(configs),
            components=MappingProxyType(components),
            scheduler=conclusion.scheduler,
            sample_size=conclusion.sample_size,
            notes=(*notes, *conclusion.notes),
        )

    @property
    def unet(self) -> UNetConfig:
        """The UNet's architecture."""
        config = self.configs["unet"]
        assert isinstance(config, UNetConfig)
        return config

    @property
    def vae(self) -> AutoencoderConfig | None:
        """The autoencoder's architecture; None if the file has none."""
        config = self.configs.get("vae")
        assert config is None or isinstance(config, AutoencoderConfig)
        return config

    @property
    def text_encoder(self) -> TextEncoderConfig | None:
        """The first text encoder's architecture; None if the file, or the refiner, has none."""
        return self._text_encoder("text_encoder")

    @property
    def text_encoder_2(self) -> TextEncoderConfig | None:
        """The architecture of XL's second text encoder; None if there is none."""
        return self._text_encoder("text_encoder_2")

    def component(self, name: ComponentName) -> Component:
        """Return a part's weights under its graph's names; raises ModelError if it has none."""
        if name not in self.components:
            raise ModelError(f"{self.path} holds no {name}; {ADVICE[name]}")
        return self.components[name]

    def _text_encoder(self, name: ComponentName) -> TextEncoderConfig | None:
        config = self.configs.get(name)
        assert config is None or isinstance(config, TextEncoderConfig)
        return config


def _parts(
    path: Path, weights: Weights, shapes: Shapes, family: Family
) -> tuple[dict[ComponentName, Config], dict[ComponentName, Component], list[str]]:
    """Read off the architectures, and find every tensor; also say what was concluded."""
    configs: dict[ComponentName, Config] = {}
    components: dict[ComponentName, Component] = {}
    notes = [f"{path.name} is of the family {family.title}"]
    used: set[str] = set()
    unused = pooled = None
    for part, prefix in find_parts(shapes, family).items():
        stored = Stored.of(path, prefix, shapes)
        config = configs[part] = read_config(part, stored, family, pooled)
        sources = sources_of(config, prefix, shapes)
        component = components[part] = assemble(path, weights, config, sources)
        used |= component.used()
        if isinstance(config, TextEncoderConfig):
            pooled = config.projection_dim or pooled
            if family.name == "sd2":  # the last layer, which is not attended to
                layer = f"{prefix}transformer.resblocks.{config.num_hidden_layers}."
                unused = re.escape(layer) + ".+"
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


def _check_widths(path: Path, family: Family, configs: Mapping[ComponentName, Config]) -> None:
    """Raise ModelError unless the parts fit together."""
    unet, vae = configs["unet"], configs.get("vae")
    assert isinstance(unet, UNetConfig)
    latent = vae.latent_channels if isinstance(vae, AutoencoderConfig) else unet.out_channels
    if unet.in_channels not in (latent, 2 * latent + 1):
        raise foreign_channels(path, unet.in_channels, latent)
    if unet.out_channels != latent:
        raise ModelError(
            f"{path} has a UNet that makes {unet.out_channels} channels and an autoencoder that "
            f"takes {latent}; use a file whose parts belong together"
        )
    texts = [config for config in configs.values() if isinstance(config, TextEncoderConfig)]
    width = sum(text.hidden_size for text in texts)
    if len(texts) == len(TEXT_ENCODERS[family.name]) and width != unet.cross_attention_dim:
        raise ModelError(
            f"{path} has a UNet that attends to {unet.cross_attention_dim} values and text "
            f"encoders that make {width}; use a file whose parts belong together"
        )


def _conclude(
    path: Path,
    weights: Weights,
    family: Family,
    configs: Mapping[ComponentName, Config],
    asked: str | None,
) -> Conclusion:
    unet, vae = configs["unet"], configs.get("vae")
    assert isinstance(unet, UNetConfig)
    return conclude(
        Told(path=path, metadata=weights.metadata, names=weights.tensors),
        family,
        inpainting=_is_inpainting(unet),
        time_condition=bool(unet.time_cond_proj_dim),
        compression=vae.compression if isinstance(vae, AutoencoderConfig) else 8,
        asked=asked,
    )


def _is_inpainting(unet: Config) -> bool:
    """A mask and the masked picture's latents are given beside the latents."""
    assert isinstance(unet, UNetConfig)
    return unet.in_channels != unet.out_channels


def open_vae(
    path: Path, scaling_factor: float = SCALING_FACTOR
) -> tuple[AutoencoderConfig, Component]:
    """Open an autoencoder alone: a file in either layout, a whole model's, or diffusers' folder.

    scaling_factor: of the model it is for; a file does not say, a folder's config.json does
    Raises ModelError when it is no autoencoder, and for any tensor that has no place.
    """
    weights = open_weights(path)
    if path.is_dir():
        config = AutoencoderConfig.load(path)
        return config, diffusers_component(path, weights, config)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    prefix = VAE if any(name.startswith(VAE) for name in shapes) else ""
    stored = Stored.of(path, prefix, shapes)
    if "encoder" not in stored:
        raise ModelError(
            f"{path} holds no autoencoder of Stable Diffusion: it has no "
            f"{prefix}encoder.conv_in.weight; give a VAE's file or folder"
        )
    config = autoencoder_config(stored, scaling_factor=scaling_factor)
    if "encoder.mid_block" in stored:
        return config, diffusers_component(path, weights, config)
    sources = sources_of(config, prefix, shapes)
    component = assemble(path, weights, config, averaged(shapes, config, sources) or sources)
    held = [name for name in shapes if name.startswith(prefix) and not name.startswith(UNET)]
    refuse_left_over(path, held, component.used() | {source.name for source in sources.values()})
    return config, component
