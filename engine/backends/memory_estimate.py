"""How much memory of a device a request takes, before anything is built or run.

Weights are counted exactly. Activations are estimated from the architecture: where the most
numbers are alive at once, each held once in the precision that the graph computes in, attention
and norms without copies of their own. TensorRT-RTX 1.7.1 plans within an eighth of that for UNets
and decoders, and a fifth less for shallow steps. Libraries that fuse less need more: ONNX Runtime
on a processor took 1.8 times as much for a decoder. Workspaces and the driver's context come on
top. Once an engine is built it says itself what it needs.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.configs.diffusion import (
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.devices.device import Device
from engine.errors import BackendError
from engine.graphs.graph import Graph, Part

GIB = 2**30
FLOAT32 = 4  # bytes
ITEM_BYTES = {"float32": FLOAT32, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is asked for; batch: pictures at once; height, width: in pixels.

    groups: of conditioning, 2 with guidance; registers: of the sampler, and 2 more where a picture
        is kept outside a mask; steps: whose noise is uploaded before
    """

    height: int
    width: int
    batch: int = 1
    groups: int = 2
    tokens: int = 77
    registers: int = 4
    steps: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes by kind.

    weights: of all parts; activations: of the part that needs most, which all parts share
    tables: registers, noise and texts; pictures: bytes of pixels
    """

    weights: int
    activations: int
    tables: int
    pictures: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.activations + self.tables + self.pictures

    def require(self, free: int, doing: str = "this request") -> None:
        """Raise BackendError when so many free bytes are too few, saying how many are missing."""
        if self.total > free:
            raise BackendError(
                f"{doing} takes about {_gib(self.total)} of the device's memory (weights "
                f"{_gib(self.weights)}, activations {_gib(self.activations)}, the rest "
                f"{_gib(self.tables + self.pictures)}) and {_gib(free)} are free, so "
                f"{_gib(self.total - free)} are missing; close what else uses the device, or ask "
                "for fewer or smaller pictures"
            )


def estimate(
    graphs: Mapping[Part, Graph],
    configs: Mapping[Part, Config],
    sizes: Sizes,
    measured: Mapping[Part, int] | None = None,
) -> MemoryEstimate:
    """Estimate a request on engines of these parts, all of them loaded.

    measured: bytes of activations that engines said themselves, in place of the estimate
    """
    measured = measured or {}
    activations = (
        measured.get(part, activation_bytes(graph, configs[part], sizes))
        for part, graph in graphs.items()
    )
    return MemoryEstimate(
        # The two parts of a UNet have the same weights, and an engine each.
        weights=sum(weight_bytes(graph) for graph in graphs.values()),
        activations=max(activations, default=0),
        tables=_tables(configs, sizes),
        pictures=3 * sizes.batch * sizes.height * sizes.width,
    )


def estimate_build(
    graph: Graph, config: Config, sizes: Sizes, workspace_bytes: int = 0
) -> MemoryEstimate:
    """Estimate the build of one part where the builder times kernels on the device.

    Its weights are there twice: those that came in, and those that kernels want in another order.
    workspace_bytes: the limit that the builder was given
    """
    return MemoryEstimate(
        weights=2 * weight_bytes(graph),
        activations=activation_bytes(graph, config, sizes) + workspace_bytes,
        tables=0,
        pictures=0,
    )


def require_memory(
    device: Device,
    graphs: Mapping[Part, Graph],
    configs: Mapping[Part, Config],
    sizes: Sizes,
    opened: Collection[Part],
) -> None:
    """Raise BackendError when a request on these parts does not fit; see `MemoryEstimate.require`.

    opened: the parts whose weights are on the device already; so is the memory that engines share
    """
    there = sum(weight_bytes(graphs[part]) for part in opened) + device.scratch(0).nbytes
    estimate(graphs, configs, sizes).require(device.memory()[0] + there)


def weight_bytes(graph: Graph) -> int:
    """Count the bytes of a graph's weights in its precision."""
    return ITEM_BYTES[graph.precision] * sum(math.prod(s) for s in graph.weights.values())


def activation_bytes(graph: Graph, config: Config, sizes: Sizes) -> int:
    """Estimate the most that is alive at once while a part runs."""
    item = ITEM_BYTES[graph.precision]
    if isinstance(config, TextEncoderConfig):
        width = 2 * config.hidden_size + 2 * config.intermediate_size
        return item * sizes.groups * sizes.batch * sizes.tokens * width
    if isinstance(config, TinyDecoderConfig):
        width = 3 * config.decoder_block_out_channels[0]
        return item * sizes.batch * sizes.height * sizes.width * width
    if isinstance(config, AutoencoderConfig):
        if config.overflows_float16:
            item = FLOAT32
        pixels = sizes.batch * sizes.height * sizes.width
        return item * max(_autoencoder(config, graph.part, pixels))
    assert isinstance(config, UNetConfig)
    rows = sizes.groups * sizes.batch
    latents = sizes.height * sizes.width // 64
    if graph.part == "step_shallow":
        width, attends = config.block_out_channels[0], 0 in config.attention_levels()
        return item * rows * latents * (_block(2 * width, width, attends) + width)
    return item * rows * max(_unet(config, latents))


def _resnet(inputs: int, outputs: int) -> int:
    """Channels alive in a residual block: its input, and what a convolution reads and writes."""
    return inputs + max(inputs + outputs, 2 * outputs)


def _transformer(width: int) -> int:
    """Channels alive in a gated feed-forward layer, 8 wide in and 4 out, around two residuals."""
    return (2 + 8 + 4) * width


def _unet(config: UNetConfig, latents: int) -> Iterator[int]:
    """Go through the levels; yields the numbers alive in each block of one row of the batch."""
    widths, levels = config.block_out_channels, len(config.block_out_channels)
    attends, inputs = config.attention_levels(), widths[0]
    skips = [(widths[0], latents)]
    for level, width in enumerate(widths):
        area = latents // 4**level
        for _ in range(config.layers()[level]):
            yield _block(inputs, width, level in attends) * area + _sum(skips)
            skips.append((width, area))
            inputs = width
        if level < levels - 1:
            skips.append((width, area // 4))
    for level in reversed(range(levels)):
        width, area = widths[level], latents // 4**level
        for _ in range(config.layers()[level] + 1):
            skip, _ = skips.pop()
            yield _block(inputs + skip, width, level in attends) * area + _sum(skips)
            inputs = width
        if level:
            yield 2 * width * 4 * area + _sum(skips)


def _block(inputs: int, outputs: int, attends: bool) -> int:
    return max(_resnet(inputs, outputs), _transformer(outputs) if attends else 0)


def _sum(skips: Sequence[tuple[int, int]]) -> int:
    return sum(width * area for width, area in skips)


def _autoencoder(config: AutoencoderConfig, part: Part, pixels: int) -> Iterator[int]:
    """Go through the levels; yields the numbers alive in the largest block of each."""
    widths = config.block_out_channels
    for level, width in enumerate(widths):
        area = pixels // 4**level
        wider = widths[min(level + 1, len(widths) - 1)]
        narrower = widths[max(level - 1, 0)]
        if part == "vae_encoder":
            yield _resnet(narrower, width) * area
        else:  # what comes from below is enlarged before it is narrowed
            yield max(2 * wider, _resnet(wider, width)) * area


def _tables(configs: Mapping[Part, Config], sizes: Sizes) -> int:
    """Count the registers, twice, the noise of all steps, and the texts."""
    unet = configs.get("step")
    if not isinstance(unet, UNetConfig):
        return 0
    latent = sizes.batch * unet.out_channels * sizes.height * sizes.width // 64
    deep = sizes.groups * latent // unet.out_channels * unet.block_out_channels[0]
    texts = sizes.groups * sizes.batch * sizes.tokens * unet.cross_attention_dim
    return FLOAT32 * (latent * (2 * sizes.registers + sizes.steps) + deep + texts)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
