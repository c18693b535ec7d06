"""The graphs of upscalers, by the class of their architecture."""

from collections.abc import Callable, Mapping
from typing import Any

from engine.configs.base import Config
from engine.configs.upscalers import COLOURS, CompactConfig, ESRGANConfig, SwinIRConfig
from engine.graphs.graph import Graph, Precision
from engine.graphs.swinir import write_swinir
from engine.graphs.writer import GraphWriter

__all__ = ["upscaler_graph"]

SLOPE = 0.2  # of ESRGAN's leaky ReLUs
RESIDUAL = 0.2  # of what a block adds


def upscaler_graph(config: Config, precision: Precision) -> Graph:
    """Write the graph of an upscaler.

    pixels (1, 3, h, w) float32 of 0 to 1 -> upscaled (1, 3, scale · h, scale · w) float32, which is
    not clamped; h and w are multiples of the configuration's `multiple`.
    """
    writer = GraphWriter("upscaler", config, precision)
    writer.give("upscaled", _NETWORKS[type(config)](writer, config, writer.given("pixels")))
    return writer.graph()


def _esrgan(writer: GraphWriter, config: ESRGANConfig, x: str) -> str:
    if config.unshuffle > 1:
        x = _unshuffled(writer, x, config.unshuffle)
    first = x = writer.conv(x, "conv_first")
    for i in range(config.num_block):
        block = x
        for j in (1, 2, 3):
            x = _dense_block(writer, x, f"body.{i}.rdb{j}", config.plus)
        x = _added(writer, block, x)
    x = writer.op("Add", first, writer.conv(x, "conv_body"))
    for i in range(config.doublings):
        x = writer.conv(writer.enlarged(x, 2), f"conv_up{i + 1}")
        x = writer.leaky_relu(x, SLOPE)
    x = writer.leaky_relu(writer.conv(x, "conv_hr"), SLOPE)
    return writer.conv(x, "conv_last")


def _dense_block(writer: GraphWriter, x: str, name: str, plus: bool) -> str:
    """Five convolutions, each over all that came before it (arXiv:1809.00219, section 3.1)."""
    known = [x]
    for i in range(1, 6):
        joined = known[0] if i == 1 else writer.op("Concat", *known, axis=1)
        found = writer.conv(joined, f"{name}.conv{i}")
        if i == 5:
            return _added(writer, x, found)
        found = writer.leaky_relu(found, SLOPE)
        if plus and i == 2:
            found = writer.op("Add", found, writer.conv(x, f"{name}.conv1x1", bias=False))
        if plus and i == 4:
            found = writer.op("Add", found, known[2])
        known.append(found)
    raise AssertionError


def _added(writer: GraphWriter, x: str, change: str) -> str:
    return writer.op("Add", x, writer.op("Mul", change, writer.numbers(RESIDUAL)))


def _unshuffled(writer: GraphWriter, x: str, factor: int) -> str:
    """Lay pixels into channels, each colour's together (torch's pixel_unshuffle)."""
    shape, side = writer.op("Shape", x), writer.whole(factor)
    rows, columns = (
        writer.op("Div", writer.op("Gather", shape, writer.whole(axis), axis=0), side)
        for axis in (2, 3)
    )
    places = writer.op("Concat", writer.whole(COLOURS), rows, side, columns, side, axis=0)
    parted = writer.op("Transpose", writer.op("Reshape", x, places), perm=[0, 2, 4, 1, 3])
    laid = writer.op("Concat", writer.whole(1, COLOURS * factor**2), rows, columns, axis=0)
    return writer.op("Reshape", parted, laid)


def _compact(writer: GraphWriter, config: CompactConfig, pixels: str) -> str:
    x = pixels
    for i in range(config.num_conv + 1):
        x = writer.conv(x, f"body.{2 * i}")
        slope = writer.weight(f"body.{2 * i + 1}.weight")
        x = writer.op("PRelu", x, writer.op("Reshape", slope, writer.whole(-1, 1, 1)))
    x = writer.shuffled(writer.conv(x, f"body.{2 * config.num_conv + 2}"), config.upscale)
    return writer.op("Add", x, writer.enlarged(pixels, config.upscale))


_NETWORKS: Mapping[type[Config], Callable[[GraphWriter, Any, str], str]] = {
    ESRGANConfig: _esrgan,
    CompactConfig: _compact,
    SwinIRConfig: write_swinir,
}
