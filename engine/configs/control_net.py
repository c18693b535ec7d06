"""Facts of a ControlNet, as diffusers' ControlNetModel names them: of a UNet, the way down."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Self

from engine.configs.base import (
    Shape,
    Sizes,
    Tensors,
    require_fixed,
    resnet_activations,
    weight,
)
from engine.configs.transformer_depths import DOWN, where_attended
from engine.configs.unet import UNetConfig, middle_tensors, time_tensors, way_down_tensors

__all__ = ["ControlNetConfig", "control_net_of", "control_net_tensors", "mirrored"]

# Fields of diffusers' ControlNet configuration with the only values that are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {"controlnet_conditioning_channel_order": ("rgb",)}
# What a ControlNet takes over from its UNet.
_SHARED = tuple(
    field.name
    for field in fields(UNetConfig)
    if field.name not in ("in_channels", "time_cond_proj_dim", "reverse_" + DOWN)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet (Zhang et al. 2023, arXiv:2302.05543, section 3).

    conditioning_channels: of the picture; conditioning_embedding_out_channels: widths of the
        convolutions that bring it to the size of the latents, half the size after each but one
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a ControlNetModel's configuration; refuse variants that change the maths."""
        require_fixed(values, _FIXED)
        downs = values.get("down_block_types")
        ups = {"up_block_types": mirrored(downs)} if isinstance(downs, list | tuple) else {}
        return super(ControlNetConfig, cls).from_dict({**values, **ups})

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one value of the hint stands for."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))

    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """Return what a way up of the mirrored blocks could have; a ControlNet has none."""
        even = [(1,) * (count + 1) for count in reversed(self.layers())]
        return where_attended(even, self.up_block_types)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' ControlNetModel."""
        return dict(control_net_tensors(self))

    def symbols(self) -> dict[str, int]:
        """Return the widths of a UNet's, and how many residuals there are."""
        return {
            **super(ControlNetConfig, self).symbols(),
            "N": sum(map(len, self.residual_widths())),
        }

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once, beside the residuals that go in and out."""
        if part == "control_hint":
            first, second, *_ = (*self.conditioning_embedding_out_channels, 0)
            return resnet_activations(first, max(first, second // 4)) * sizes.pixels
        latents = sizes.height * sizes.width // 64
        rows = sizes.groups * sizes.batch
        own: int = super(ControlNetConfig, self).activations(part, sizes)
        return own + 3 * rows * self._residuals(latents)

    def tables(self, sizes: Sizes) -> int:
        """Count what each of its two parts has on a device beside what a step has there.

        A hint, as it was made and as calls read it; residuals, that are zeros and that are its own.
        """
        latents, rows = sizes.height * sizes.width // 64, sizes.groups * sizes.batch
        hint = sizes.batch * self.block_out_channels[0] * latents
        return hint + rows * self._residuals(latents)

    def _residuals(self, latents: int) -> int:
        levels = enumerate(self.residual_widths())
        return sum(sum(widths) * (latents >> 2 * level) for level, widths in levels)


def control_net_of(
    unet: UNetConfig, kind: type[ControlNetConfig] = ControlNetConfig
) -> ControlNetConfig:
    """Return the architecture of the ControlNets that were made of a UNet's way down.

    kind: of ControlNets, a union of them is another
    """
    values = {name: getattr(unet, name) for name in _SHARED}
    return kind(**values, in_channels=unet.out_channels)


def mirrored(down_block_types: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return the blocks of a way up that belongs to this way down; a ControlNet has none."""
    return tuple(str(block).replace("Down", "Up") for block in reversed(down_block_types))


def control_net_tensors(config: ControlNetConfig) -> Tensors:
    """Yield a ControlNet's tensors, by their names in diffusers' ControlNetModel."""
    widths, hints = config.block_out_channels, config.conditioning_embedding_out_channels
    yield from weight("conv_in", widths[0], config.in_channels, 3, 3)
    yield from time_tensors(config)
    skips = yield from way_down_tensors(config)
    yield from middle_tensors(config)
    name = "controlnet_cond_embedding"
    yield from weight(f"{name}.conv_in", hints[0], config.conditioning_channels, 3, 3)
    for i, (width, following) in enumerate(pairwise(hints)):
        yield from weight(f"{name}.blocks.{2 * i}", width, width, 3, 3)
        yield from weight(f"{name}.blocks.{2 * i + 1}", following, width, 3, 3)
    yield from weight(f"{name}.conv_out", widths[0], hints[-1], 3, 3)
    for i, width in enumerate(skips):
        yield from weight(f"controlnet_down_blocks.{i}", width, width, 1, 1)
    yield from weight("controlnet_mid_block", widths[-1], widths[-1], 1, 1)
