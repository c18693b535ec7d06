"""Facts of a diffusion upsampler: a UNet that makes what a low picture lacks out of noise.

It works on the low picture's own grid. What it denoises is the difference between the picture and
the low one enlarged by Lanczos' kernel (Li et al. 2022, arXiv:2104.14951, section 3), times
`RESIDUAL_SCALE`, with the pixels of each cell as its channels, as torch's pixel_unshuffle lays
them. Beside it, by channels, lies the low picture enlarged (SR3, Saharia et al. 2021,
arXiv:2104.07636), to which noise of a level was added that an embedding tells (Ho et al. 2022,
arXiv:2106.15282, section 4.1; Imagen, arXiv:2205.11487, section 2.4).

The names of tensors are those of diffusers' UNet2DModel without attention, whose
`class_embed_type` is "timestep".
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.configs.base import Shape, Sizes, Tensors, resnet, resnet_activations, weight
from engine.configs.upscalers import COLOURS, UpscalerConfig

__all__ = [
    "LOW_RES_SCHEDULER",
    "MAX_NOISE_LEVEL",
    "NORM_EPS",
    "NORM_GROUPS",
    "RESIDUAL_SCALE",
    "SCHEDULER",
    "STEPS",
    "UpsamplerConfig",
]

NORM_GROUPS, NORM_EPS = 8, 1e-5
RESIDUAL_SCALE = 6.0  # brings what Lanczos leaves out to a variance nearer to the noise's
STEPS = 4
MAX_NOISE_LEVEL = 100  # a timestep of the low picture's schedule; training goes no further
LOW_RES_SCHEDULER: Mapping[str, object] = MappingProxyType(
    {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "num_train_timesteps": 1000,
    }
)
SCHEDULER: Mapping[str, object] = MappingProxyType(
    {
        **LOW_RES_SCHEDULER,
        "_class_name": "DDIMScheduler",
        "prediction_type": "sample",  # few channels need not carry the noise of all pixels
        "timestep_spacing": "trailing",
    }
)
Channels = list[list[tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsamplerConfig(UpscalerConfig):
    """A UNet of residual blocks.

    block_out_channels: widths of the levels, the first at the low picture's size; multiples of 8
    layers_per_block: residual blocks of a level on the way down; one more on the way up
    upscale: of both sides
    """

    block_out_channels: tuple[int, ...] = (24, 48, 96)
    layers_per_block: int = 1
    upscale: int = 2

    @property
    def scale(self) -> int:
        """How many times larger both sides become."""
        return self.upscale

    @property
    def multiple(self) -> int:
        """Every level but the last is halved."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def out_channels(self) -> int:
        """The numbers of a cell of the low picture's grid: its pixels' colours."""
        return COLOURS * self.upscale**2

    @property
    def time_channels(self) -> int:
        """Width of the embedded timestep and noise level."""
        return 4 * self.block_out_channels[0]

    def symbols(self) -> dict[str, int]:
        """Return the channels of what is denoised, and with the low picture's beside them."""
        return {"C": self.out_channels, "X": 2 * self.out_channels}

    def down_channels(self) -> Channels:
        """Return the channels that each residual block of the way down takes and gives."""
        widths = self.block_out_channels
        return [
            [(inputs if j == 0 else outputs, outputs) for j in range(self.layers_per_block)]
            for inputs, outputs in zip((widths[0], *widths), widths, strict=False)
        ]

    def up_channels(self) -> Channels:
        """Return the same of the way up, where each also takes what one on the way down gave."""
        skips = [self.block_out_channels[0]]
        for level, blocks in enumerate(self.down_channels()):
            skips += [outputs for _, outputs in blocks]
            skips += [blocks[-1][1]] if level < len(self.block_out_channels) - 1 else []
        found, width = Channels(), self.block_out_channels[-1]
        for outputs in reversed(self.block_out_channels):
            level_blocks = []
            for _ in range(self.layers_per_block + 1):
                level_blocks.append((width + skips.pop(), outputs))
                width = outputs
            found.append(level_blocks)
        return found

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' UNet2DModel."""
        return dict(_tensors(self))

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: at the end of the way up, or around it."""
        largest = max(resnet_activations(*each) for each in self.up_channels()[-1])
        kept = (self.layers_per_block + 1) * self.block_out_channels[0]
        return (largest + kept + 4 * self.out_channels) * sizes.pixels

    def products(self) -> int:
        """Count the multiplications of one call, for each pixel of the low picture."""
        last = len(self.block_out_channels) - 1
        convolutions = {n: shape for n, shape in self.tensor_shapes().items() if len(shape) == 4}
        total = sum(math.prod(s) / 4.0 ** _halvings(n, last) for n, s in convolutions.items())
        return round(total)


def _halvings(name: str, last: int) -> int:
    """Return how often the sides were halved where a convolution gives its output."""
    block, number, kind, *_ = name.split(".") if "blocks" in name else (name, "0", "")
    if block == "down_blocks":
        return int(number) + (kind == "downsamplers")
    if block == "up_blocks":
        return last - int(number) - (kind == "upsamplers")
    return last if block.startswith("mid_block") else 0


def _tensors(config: UpsamplerConfig) -> Tensors:
    widths, time = config.block_out_channels, config.time_channels
    yield from weight("conv_in", widths[0], 2 * config.out_channels, 3, 3)
    for name in ("time_embedding", "class_embedding"):
        yield from weight(f"{name}.linear_1", time, widths[0])
        yield from weight(f"{name}.linear_2", time, time)
    for name, levels, resampler in (
        ("down_blocks", config.down_channels(), "downsamplers"),
        ("up_blocks", config.up_channels(), "upsamplers"),
    ):
        for i, blocks in enumerate(levels):
            yield from _blocks(f"{name}.{i}", blocks, time)
            if i < len(widths) - 1:
                outputs = blocks[-1][1]
                yield from weight(f"{name}.{i}.{resampler}.0.conv", outputs, outputs, 3, 3)
    yield from _blocks("mid_block", [(widths[-1], widths[-1])] * 2, time)
    yield from weight("conv_norm_out", widths[0])
    yield from weight("conv_out", config.out_channels, widths[0], 3, 3)


def _blocks(name: str, blocks: list[tuple[int, int]], time: int) -> Iterator[tuple[str, Shape]]:
    for j, (inputs, outputs) in enumerate(blocks):
        yield from resnet(f"{name}.resnets.{j}", inputs, outputs, time)
