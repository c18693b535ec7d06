"""Facts of a tiny decoder for previews, as diffusers' AutoencoderTiny names them.

It is the decoder of TAESD (Bohan, "Tiny AutoEncoder for Stable Diffusion"), which takes the
latents scaled, as they are in the sampler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import Config, require_fixed
from engine.errors import ModelError

LEVELS = 4  # and twice the size between them


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoderConfig(Config):
    """The half of a tiny autoencoder that previews need; all its levels have one width."""

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Refuse widths that change, and other numbers of levels."""
        super(TinyDecoderConfig, self).__post_init__()
        widths, blocks = self.decoder_block_out_channels, self.num_decoder_blocks
        if len(widths) != LEVELS or len(blocks) != LEVELS or len(set(widths)) > 1:
            raise ModelError(
                f"a tiny decoder of the widths {widths} and blocks {blocks} is not supported; it "
                f"must have {LEVELS} levels of one width, as TAESD has"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an AutoencoderTiny's configuration; refuse variants that change the maths."""
        kind = values.get("_class_name")
        if kind != "AutoencoderTiny":
            raise ModelError(
                f"config.json is of the class {kind!r}; an AutoencoderTiny's is expected, of TAESD "
                "or its kin"
            )
        require_fixed(values, _FIXED)
        return super(TinyDecoderConfig, cls).from_dict(values)

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (LEVELS - 1))


# Fields of diffusers' configuration with the only values that are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "out_channels": (3,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0, None),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
