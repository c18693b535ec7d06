"""Facts of a tiny autoencoder, as diffusers' AutoencoderTiny names them, and of its decoder alone.

TAESD (Bohan, "Tiny AutoEncoder for Stable Diffusion") takes and gives the latents scaled, as they
are in the sampler. All its levels have one width, and it has four.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import Config, Shape, Sizes, Tensors, require_fixed, weight
from engine.errors import ModelError

__all__ = ["TINY_CLASS", "TINY_LEVELS", "TinyAutoencoderConfig", "TinyDecoderConfig"]

TINY_LEVELS = 4  # and twice the size between them
TINY_CLASS = "AutoencoderTiny"
# Fields of diffusers' configuration with the only values that are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0, None),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoderConfig(Config):
    """The half of a tiny autoencoder that previews need."""

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Refuse widths that change, and other numbers of levels."""
        super(TinyDecoderConfig, self).__post_init__()
        _check_levels("decoder", self.decoder_block_out_channels, self.num_decoder_blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an AutoencoderTiny's configuration; refuse variants that change the maths."""
        _check_class(values)
        return super(TinyDecoderConfig, cls).from_dict(values)

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (TINY_LEVELS - 1))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' AutoencoderTiny."""
        width = self.decoder_block_out_channels[0]
        return dict(_decoder(self.latent_channels, width, self.num_decoder_blocks))

    def symbols(self) -> dict[str, int]:
        """Return the channels of the latents."""
        return {"C": self.latent_channels}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in a block of the widest level."""
        return 3 * self.decoder_block_out_channels[0] * sizes.pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyAutoencoderConfig(Config):
    """A tiny autoencoder in the place of a model's own."""

    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Refuse widths that change, and other numbers of levels."""
        super(TinyAutoencoderConfig, self).__post_init__()
        _check_levels("encoder", self.encoder_block_out_channels, self.num_encoder_blocks)
        _check_levels("decoder", self.decoder_block_out_channels, self.num_decoder_blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an AutoencoderTiny's configuration; refuse variants that change the maths."""
        _check_class(values)
        return super(TinyAutoencoderConfig, cls).from_dict(values)

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (TINY_LEVELS - 1))

    @property
    def draws_posterior(self) -> bool:
        """Whether latents of a picture are drawn from a distribution; these are the picture's."""
        return False

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' AutoencoderTiny."""
        encoder, decoder = self.encoder_block_out_channels[0], self.decoder_block_out_channels[0]
        return dict(_encoder(self.latent_channels, encoder, self.num_encoder_blocks)) | dict(
            _decoder(self.latent_channels, decoder, self.num_decoder_blocks)
        )

    def symbols(self) -> dict[str, int]:
        """Return the channels of the latents."""
        return {"C": self.latent_channels}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in a block of the widest level."""
        coder = self.encoder_block_out_channels, self.decoder_block_out_channels
        return 3 * coder[part == "vae_decoder"][0] * sizes.pixels


def _check_class(values: Mapping[str, Any]) -> None:
    kind = values.get("_class_name")
    if kind != TINY_CLASS:
        raise ModelError(
            f"config.json is of the class {kind!r}; an AutoencoderTiny's is expected, of TAESD "
            "or its kin"
        )
    require_fixed(values, _FIXED)


def _check_levels(half: str, widths: Sequence[int], blocks: Sequence[int]) -> None:
    if len(widths) != TINY_LEVELS or len(blocks) != TINY_LEVELS or len(set(widths)) > 1:
        raise ModelError(
            f"a tiny {half} of the widths {widths} and blocks {blocks} is not supported; it "
            f"must have {TINY_LEVELS} levels of one width, as TAESD has"
        )


def _encoder(latent: int, width: int, levels: Sequence[int]) -> Tensors:
    """Layers are numbered through all levels; each begins with a convolution, in steps of two."""
    number = 0
    for level, blocks in enumerate(levels):
        inputs = width if level else 3
        yield from weight(f"encoder.layers.{number}", width, inputs, 3, 3, bias=not level)
        yield from _blocks("encoder", number + 1, blocks, width)
        number += 1 + blocks
    yield from weight(f"encoder.layers.{number}", latent, width, 3, 3)


def _decoder(latent: int, width: int, levels: Sequence[int]) -> Tensors:
    """Layers are numbered through all levels, and those without weights count too."""
    yield from weight("decoder.layers.0", width, latent, 3, 3)
    number = 2  # an activation comes second
    for level, blocks in enumerate(levels, 1):
        yield from _blocks("decoder", number, blocks, width)
        number += blocks
        if level < len(levels):
            number += 1  # the enlarging
            yield from weight(f"decoder.layers.{number}", width, width, 3, 3, bias=False)
            number += 1
    yield from weight(f"decoder.layers.{number}", 3, width, 3, 3)


def _blocks(half: str, number: int, count: int, width: int) -> Iterator[tuple[str, Shape]]:
    for block in range(number, number + count):
        for conv in (0, 2, 4):
            yield from weight(f"{half}.layers.{block}.conv.{conv}", width, width, 3, 3)
