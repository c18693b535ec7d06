"""How a file of the original layout keeps a part: where, how it is read, what tensors are called.

The functions at the end make the layouts of the parts that the families here are made of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from engine.checkpoints.architecture import (
    CONDITIONS,
    Stored,
    autoencoder_config,
    clip_config,
    open_clip_config,
    unet_config,
)
from engine.checkpoints.component import ComponentName, Source, fits
from engine.checkpoints.ldm_names import (
    Sources,
    autoencoder_sources,
    open_clip_sources,
    renamed_open_clip_sources,
    text_encoder_sources,
    unet_sources,
)
from engine.checkpoints.tiny_autoencoder import (
    has_tiny_decoder,
    tiny_config,
    tiny_sources,
    wanted_sources,
)
from engine.configs.base import Config, Shape
from engine.configs.diffusion import (
    AutoencoderConfig,
    TextEncoderConfig,
    TinyAutoencoderConfig,
    UNetConfig,
)
from engine.errors import ModelError

__all__ = [
    "UNET",
    "VAE",
    "PartLayout",
    "Shapes",
    "autoencoder",
    "averaged",
    "clip",
    "open_clip",
    "read_config",
    "unet",
]

Shapes = Mapping[str, Shape]
C = TypeVar("C", bound=Config)

UNET = "model.diffusion_model."
# The others are stable-diffusion.cpp's: of an autoencoder that was given apart, of a tiny one.
VAE = ("first_stage_model.", "vae.", "tae.")
AVERAGED = "model_ema."  # what follows is the name under `model.` without its dots
POOLED = 1280  # width of XL's pooled text, where its encoder is not in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout(Generic[C]):
    """How files keep a part.

    prefixes: of its tensors; the first that a file has counts
    read: its architecture, off its shapes; also given those of the parts before it
    sources: where each of its tensors is
    unused: the beginning of names under the prefix, of tensors that the model does not use
    """

    prefixes: tuple[str, ...]
    read: Callable[[Stored, Mapping[ComponentName, Config]], C]
    sources: Callable[[C, Stored], Sources]
    unused: Callable[[C, Stored], str] | None = None

    def prefix(self, shapes: Shapes) -> str | None:
        """Return the prefix that a file has; None when it has not the part."""
        return next((p for p in self.prefixes if any(name.startswith(p) for name in shapes)), None)


def read_config(
    part: ComponentName,
    layout: PartLayout[C],
    stored: Stored,
    before: Mapping[ComponentName, Config],
) -> C:
    """Read off a part's architecture; raises ModelError naming the file."""
    try:
        return layout.read(stored, before)
    except ModelError as error:
        if str(stored.path) in str(error):
            raise
        raise ModelError(f"{stored.path} has tensors of no {part} that runs: {error}") from error


def averaged(shapes: Shapes, config: Config, sources: Sources) -> Sources | None:
    """Say where the running means of a UNet's weights are; None unless all of them are there."""
    expected, means = config.tensor_shapes(), {}
    for name, source in sources.items():
        mean = AVERAGED + source.name.removeprefix("model.").replace(".", "")
        if mean not in shapes or not fits(source.shape(shapes[mean]), expected[name]):
            return None
        means[name] = replace(source, name=mean)
    return means


def clip(prefixes: tuple[str, ...]) -> PartLayout[TextEncoderConfig]:
    """Return the layout of a CLIP text encoder with transformers' names."""
    return PartLayout(
        prefixes=prefixes,
        read=lambda stored, before: clip_config(stored),
        sources=lambda config, stored: text_encoder_sources(config, stored.prefix),
    )


def open_clip(prefixes: tuple[str, ...], *, pooled: bool) -> PartLayout[TextEncoderConfig]:
    """Return the layout of an OpenCLIP text tower, under its own names or transformers'.

    pooled: the model is told the projected text; else it does not attend to the last layer
    """

    def sources(config: TextEncoderConfig, stored: Stored) -> Sources:
        if "encoder.layers" in stored:
            return renamed_open_clip_sources(config, stored.prefix, stored.shapes)
        return _under(stored, open_clip_sources(config))

    def last(config: TextEncoderConfig, stored: Stored) -> str:
        layers = "encoder.layers" if "encoder.layers" in stored else "transformer.resblocks"
        return f"{layers}.{config.num_hidden_layers}."

    return PartLayout(
        prefixes=prefixes,
        read=lambda stored, before: open_clip_config(stored, pooled=pooled),
        sources=sources,
        unused=None if pooled else last,
    )


def unet(*, linear: bool, refiner: bool = False) -> PartLayout[UNetConfig]:
    """Return the layout of a UNet; linear, refiner: see `unet_config`."""

    def read(stored: Stored, before: Mapping[ComponentName, Config]) -> UNetConfig:
        encoder = before.get("text_encoder_2")
        pooled = encoder.symbols()["P"] if encoder else POOLED
        return unet_config(stored, linear=linear, pooled=pooled, refiner=refiner)

    def sources(config: UNetConfig, stored: Stored) -> Sources:
        found = _under(stored, unet_sources(config))
        for name in CONDITIONS:
            if stored.prefix + name in stored.shapes:
                found["time_embedding.cond_proj.weight"] = Source(name=stored.prefix + name)
        return found

    return PartLayout(prefixes=(UNET,), read=read, sources=sources)


def autoencoder(
    scaling_factor: float,
) -> PartLayout[AutoencoderConfig | TinyAutoencoderConfig]:
    """Return the layout of an autoencoder, whose scaling factor is no tensor's shape, or a tiny."""

    def read(
        stored: Stored, before: Mapping[ComponentName, Config]
    ) -> AutoencoderConfig | TinyAutoencoderConfig:
        if has_tiny_decoder(stored.shapes, stored.prefix):
            tiny = tiny_sources(stored.shapes, stored.prefix)
            return tiny_config(stored.path, {n: stored.shapes[s.name] for n, s in tiny.items()})
        return autoencoder_config(stored, scaling_factor=scaling_factor)

    def sources(config: AutoencoderConfig | TinyAutoencoderConfig, stored: Stored) -> Sources:
        if isinstance(config, TinyAutoencoderConfig):
            return wanted_sources(config, stored.shapes, stored.prefix)
        return _under(stored, autoencoder_sources(config))

    return PartLayout(prefixes=VAE, read=read, sources=sources)


def _under(stored: Stored, sources: Sources) -> Sources:
    """Put a part's prefix before the names of its table."""
    return {name: replace(s, name=stored.prefix + s.name) for name, s in sources.items()}
