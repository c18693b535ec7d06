"""Facts of a T2I-Adapter: the convolutions that make features for a UNet's way down of a picture.

(Mou et al. 2023, arXiv:2302.08453, section 3.2.) Tensors have the names of diffusers' T2IAdapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.configs.base import Config, Shape, Sizes, Tensors, require_among, weight

__all__ = [
    "AdaptedPlace",
    "FeatureSumConfig",
    "T2IAdapterConfig",
    "adapted_places",
    "feature_sum_of",
]

COMPRESSION = 8  # pixels along one side of a latent's cell
LARGER = 16  # what XL's begin with, and halve once
LAST = re.compile(r"mid_block\.resnets\.(\d+)\.conv2\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class T2IAdapterConfig(Config):
    """A T2I-Adapter of TencentARC's, full or light.

    in_channels: of the picture, 3 or 1; downscale_factor: pixels of it along one side of a square
        that becomes channels, 8, or 16 for XL
    channels: of every feature; num_res_blocks: before each
    light: whether blocks compute in a quarter of the channels
    kernel: side of the second convolutions and of those between widths, in a full one
    strided: whether a full one halves with convolutions in the place of averages
    """

    channels: tuple[int, ...]
    in_channels: int = 3
    downscale_factor: int = COMPRESSION
    num_res_blocks: int = 2
    light: bool = False
    kernel: int = 1
    strided: bool = False

    def __post_init__(self) -> None:
        """Refuse sides of convolutions and of squares that no T2I-Adapter has."""
        super(T2IAdapterConfig, self).__post_init__()
        require_among("kernel", self.kernel, (1, 3))
        require_among("downscale_factor", self.downscale_factor, (COMPRESSION, LARGER))

    @property
    def inputs(self) -> int:
        """Channels of the picture once its squares are channels."""
        return self.in_channels * self.downscale_factor**2

    @property
    def halves(self) -> tuple[bool, ...]:
        """Whether each feature has half the sides of what comes before; XL's third alone has."""
        if self.downscale_factor == LARGER:
            return tuple(i == 2 for i in range(len(self.channels)))
        return tuple(i > 0 for i in range(len(self.channels)))

    def features(self) -> list[tuple[int, int]]:
        """Return the channels of every feature, and the level of a UNet that has its sides."""
        level, found = int(self.downscale_factor == LARGER), []
        for width, halved in zip(self.channels, self.halves, strict=True):
            level += halved
            found.append((width, level))
        return found

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor."""
        return dict(self._light_tensors() if self.light else self._tensors())

    def symbols(self) -> dict[str, int]:
        """Return the channels that go in."""
        return {"X": self.inputs}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: a step's features, once summed and once not."""
        features = sum(_numbers(*feature, sizes) for feature in self.features())
        return 2 * sizes.groups * sizes.batch * features

    def _tensors(self) -> Tensors:
        yield from weight("adapter.conv_in", self.channels[0], self.inputs, 3, 3)
        before, side = self.channels[0], self.kernel
        for i, (width, halved) in enumerate(zip(self.channels, self.halves, strict=True)):
            block = f"adapter.body.{i}"
            if halved and self.strided:
                yield from weight(f"{block}.downsample", before, before, 3, 3)
            if before != width:
                yield from weight(f"{block}.in_conv", width, before, side, side)
            for j in range(self.num_res_blocks):
                yield from weight(f"{block}.resnets.{j}.block1", width, width, 3, 3)
                yield from weight(f"{block}.resnets.{j}.block2", width, width, side, side)
            before = width

    def _light_tensors(self) -> Tensors:
        before = self.inputs
        for i, width in enumerate(self.channels):
            block, inner = f"adapter.body.{i}", width // 4
            yield from weight(f"{block}.in_conv", inner, before, 1, 1)
            for j in range(self.num_res_blocks):
                yield from weight(f"{block}.resnets.{j}.block1", inner, inner, 3, 3)
                yield from weight(f"{block}.resnets.{j}.block2", inner, inner, 3, 3)
            yield from weight(f"{block}.out_conv", width, inner, 1, 1)
            before = width


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSumConfig(Config):
    """What adds the features of a T2I-Adapter, weighed, to those of others. It has no tensors.

    channels: of every feature; scales: how often its sides go into the latents'
    """

    channels: tuple[int, ...]
    scales: tuple[int, ...]

    def features(self) -> list[tuple[int, int]]:
        """Return the channels of every feature, and the level of a UNet that has its sides."""
        levels = [scale.bit_length() - 1 for scale in self.scales]
        return list(zip(self.channels, levels, strict=True))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return none."""
        return {}

    def symbols(self) -> dict[str, int]:
        """Return how many features there are."""
        return {"N": len(self.channels)}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: the largest feature, weighed for every group."""
        rows = sizes.groups * sizes.batch
        return rows * max(_numbers(*feature, sizes) for feature in self.features())

    def tables(self, sizes: Sizes) -> int:
        """Count the features that are added, for every picture, and three sums of them."""
        numbers = sum(_numbers(*feature, sizes) for feature in self.features())
        return sizes.batch * (1 + 3 * sizes.groups) * numbers


def feature_sum_of(config: T2IAdapterConfig) -> FeatureSumConfig:
    """Return the architecture of the sum that a T2I-Adapter's features are added to."""
    channels, levels = zip(*config.features(), strict=True)
    return FeatureSumConfig(channels=channels, scales=tuple(2**level for level in levels))


def _numbers(width: int, level: int, sizes: Sizes) -> int:
    return width * (sizes.height * sizes.width // COMPRESSION**2 >> 2 * level)


class AdaptedPlace(NamedTuple):
    """Where a feature is added: to what follows a module; of which width and a level's sides."""

    module: str
    width: int
    level: int


def adapted_places(shapes: Mapping[str, Shape]) -> list[AdaptedPlace]:
    """Return where a UNet takes a T2I-Adapter's features, as diffusers adds them.

    That is behind the last transformer of each level, before it is halved; where a level has none,
    behind all of it; and behind the middle.
    shapes: of the UNet's tensors, by name
    """
    places, level = list[AdaptedPlace](), 0
    while f"down_blocks.{level}.resnets.0.conv1.weight" in shapes:
        block = f"down_blocks.{level}"
        layers = 0
        while f"{block}.resnets.{layers}.conv1.weight" in shapes:
            layers += 1
        width = shapes[f"{block}.resnets.0.conv1.weight"][0]
        module, sides = f"{block}.resnets.{layers - 1}.conv2", level
        if f"{block}.attentions.{layers - 1}.proj_out.weight" in shapes:
            module = f"{block}.attentions.{layers - 1}.proj_out"
        elif f"{block}.downsamplers.0.conv.weight" in shapes:
            module, sides = f"{block}.downsamplers.0.conv", level + 1
        places.append(AdaptedPlace(module, width, sides))
        level += 1
    last = [name for name in shapes if LAST.fullmatch(name)]
    if last:
        module = max(last, key=lambda name: int(name.split(".")[2]))
        width = shapes[module][0]
        places.append(AdaptedPlace(module.removesuffix(".weight"), width, level - 1))
    return places
