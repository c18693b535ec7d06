"""The graph of SwinIR (Liang et al. 2021, arXiv:2108.10257).

Features lie as (1, h, w, C) between convolutions. The shifted windows' mask follows from the
picture's size, so it is computed in the graph, once for all blocks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.configs.upscalers import SwinIRConfig
from engine.graphs.writer import GraphWriter

__all__ = ["write_swinir"]

MEAN = (0.4488, 0.4371, 0.4040)  # of the colours of DIV2K
OUTSIDE = -100.0  # what is added to scores across the picture's rolled edges
FIRST_SLOPE, SLOPE = 0.01, 0.2  # of the leaky ReLUs: before the enlarging, and elsewhere


def write_swinir(writer: GraphWriter, config: SwinIRConfig, pixels: str) -> str:
    """Write the network; pixels: (1, 3, h, w), h and w whole windows."""
    mean = writer.numbers(np.reshape(MEAN, (3, 1, 1)))
    centred = writer.op("Sub", pixels, mean)
    if config.img_range != 1:
        centred = writer.op("Mul", centred, writer.numbers(config.img_range))
    first = writer.conv(centred, "conv_first")
    windows = _Windows.of(writer, pixels, config)
    x = writer.layer_norm(_channels_last(writer, first), "patch_embed.norm")
    for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        group = x
        for j in range(depth):
            name = f"layers.{i}.residual_group.blocks.{j}"
            x = _block(writer, config, windows, x, name, heads, is_shifted=j % 2 == 1)
        end = _group_end(writer, config, _channels_first(writer, x), f"layers.{i}.conv")
        x = writer.op("Add", group, _channels_last(writer, end))
    x = _channels_first(writer, writer.layer_norm(x, "norm"))
    x = writer.op("Add", first, _group_end(writer, config, x, "conv_after_body"))
    x = _enlarged(writer, config, x)
    if config.img_range != 1:
        x = writer.op("Div", x, writer.numbers(config.img_range))
    return writer.op("Add", x, mean if config.upsampler else pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Windows:
    """Shapes that follow from the picture's, and the mask of shifted windows, (n, 1, N, N)."""

    size: int
    parted: str  # (h / s, s, w / s, s, C)
    joined: str  # (h / s, w / s, s, s, C)
    whole: str  # (1, h, w, C)
    mask: str

    @classmethod
    def of(cls, writer: GraphWriter, pixels: str, config: SwinIRConfig) -> "_Windows":
        size, width = config.window_size, writer.whole(config.embed_dim)
        shape, side = writer.op("Shape", pixels), writer.whole(size)
        height = writer.op("Gather", shape, writer.whole(2), axis=0)
        across = writer.op("Gather", shape, writer.whole(3), axis=0)
        rows, columns = (writer.op("Div", each, side) for each in (height, across))

        def joined(*sizes: str) -> str:
            return writer.op("Concat", *sizes, axis=0)

        def regions(length: str) -> str:
            """Number the places along a side: those before the rolled edge's windows 0, then 1, 2.

            (length,)
            """
            first, step = (writer.array(np.array(number)) for number in (0, 1))
            places = writer.op("Range", first, _scalar(writer, length), step)
            found = []
            for border in (size, size // 2):
                edge = writer.op("Sub", length, writer.whole(border))
                found.append(writer.op("Cast", writer.op("GreaterOrEqual", places, edge), to=7))
            return writer.op("Add", *found)

        tall = writer.op("Mul", regions(height), writer.whole(3))
        grid = writer.op(
            "Add",
            writer.op("Reshape", tall, writer.whole(-1, 1)),
            writer.op("Reshape", regions(across), writer.whole(1, -1)),
        )
        cut = writer.op("Reshape", grid, joined(rows, side, columns, side))
        cut = writer.op("Transpose", cut, perm=[0, 2, 1, 3])
        places = size**2
        ours = writer.op("Reshape", cut, writer.whole(-1, 1, places, 1))
        theirs = writer.op("Reshape", cut, writer.whole(-1, 1, 1, places))
        same = writer.op("Equal", ours, theirs)
        return cls(
            size=size,
            parted=joined(rows, side, columns, side, width),
            joined=joined(rows, columns, side, side, width),
            whole=joined(writer.whole(1), height, across, width),
            mask=writer.op("Where", same, writer.numbers(0.0), writer.numbers(OUTSIDE)),
        )


def _scalar(writer: GraphWriter, value: str) -> str:
    return writer.op("Reshape", value, writer.array(np.zeros(0, np.int64)))


def _block(
    writer: GraphWriter,
    config: SwinIRConfig,
    windows: _Windows,
    x: str,
    name: str,
    heads: int,
    *,
    is_shifted: bool,
) -> str:
    size, width = windows.size, config.embed_dim
    y = writer.layer_norm(x, f"{name}.norm1")
    if is_shifted:
        y = _rolled(writer, y, size // 2)
    y = writer.op("Transpose", writer.op("Reshape", y, windows.parted), perm=[0, 2, 1, 3, 4])
    y = writer.op("Reshape", y, writer.whole(-1, size**2, width))
    y = _attention(writer, config, windows, y, f"{name}.attn", heads, is_shifted=is_shifted)
    y = writer.op("Transpose", writer.op("Reshape", y, windows.joined), perm=[0, 2, 1, 3, 4])
    y = writer.op("Reshape", y, windows.whole)
    if is_shifted:
        y = _rolled(writer, y, -(size // 2))
    x = writer.op("Add", x, y)
    y = writer.linear(writer.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
    return writer.op("Add", x, writer.linear(writer.op("Gelu", y), f"{name}.mlp.fc2"))


def _attention(
    writer: GraphWriter,
    config: SwinIRConfig,
    windows: _Windows,
    x: str,
    name: str,
    heads: int,
    *,
    is_shifted: bool,
) -> str:
    """Attend within each of n windows of N places, (n, N, C), with a bias for every distance."""
    places, head = windows.size**2, config.embed_dim // heads
    qkv = writer.op(
        "Reshape", writer.linear(x, f"{name}.qkv"), writer.whole(-1, places, 3, heads, head)
    )
    qkv = writer.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (
        writer.op("Gather", qkv, writer.array(np.array(i)), axis=0) for i in range(3)
    )  # (n, heads, N, C / heads)
    q = writer.op("Mul", q, writer.numbers(head**-0.5))
    scores = writer.op("MatMul", q, writer.op("Transpose", k, perm=[0, 1, 3, 2]))
    table = writer.weight(f"{name}.relative_position_bias_table")
    bias = writer.op("Gather", table, writer.array(_distances(windows.size)), axis=0)
    scores = writer.op("Add", scores, writer.op("Transpose", bias, perm=[2, 0, 1]))
    if is_shifted:
        scores = writer.op("Add", scores, windows.mask)
    y = writer.op("MatMul", writer.op("Softmax", scores, axis=-1), v)
    y = writer.op("Transpose", y, perm=[0, 2, 1, 3])
    y = writer.op("Reshape", y, writer.whole(-1, places, config.embed_dim))
    return writer.linear(y, f"{name}.proj")


def _distances(size: int) -> NDArray[np.int64]:
    """Return the row of the table of biases for every two places of a window, (N, N)."""
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij")).reshape(2, -1)
    down, across = places[:, :, None] - places[:, None, :] + size - 1
    rows: NDArray[np.int64] = down * (2 * size - 1) + across
    return rows


def _rolled(writer: GraphWriter, x: str, shift: int) -> str:
    """Move (1, h, w, C) up and to the left, in a circle."""
    end = writer.whole(2**62)
    for axis in (1, 2):
        cut, along = writer.whole(shift), writer.whole(axis)
        tail = writer.op("Slice", x, cut, end, along)
        head = writer.op("Slice", x, writer.whole(0), cut, along)
        x = writer.op("Concat", tail, head, axis=axis)
    return x


def _group_end(writer: GraphWriter, config: SwinIRConfig, x: str, name: str) -> str:
    if not config.three_convs:
        return writer.conv(x, name)
    for layer in (0, 2):
        x = writer.leaky_relu(writer.conv(x, f"{name}.{layer}"), SLOPE)
    return writer.conv(x, f"{name}.4")


def _enlarged(writer: GraphWriter, config: SwinIRConfig, x: str) -> str:
    if config.upsampler == "pixelshuffledirect":
        return writer.shuffled(writer.conv(x, "upsample.0"), config.upscale)
    if config.upsampler:
        x = writer.leaky_relu(writer.conv(x, "conv_before_upsample.0"), FIRST_SLOPE)
        for i, factor in enumerate(config.factors):
            if config.upsampler == "pixelshuffle":
                x = writer.shuffled(writer.conv(x, f"upsample.{2 * i}"), factor)
            else:
                x = writer.conv(writer.enlarged(x, factor), f"conv_up{i + 1}")
                x = writer.leaky_relu(x, SLOPE)
    if config.upsampler == "nearest+conv":
        x = writer.leaky_relu(writer.conv(x, "conv_hr"), SLOPE)
    return writer.conv(x, "conv_last")


def _channels_last(writer: GraphWriter, x: str) -> str:
    return writer.op("Transpose", x, perm=[0, 2, 3, 1])


def _channels_first(writer: GraphWriter, x: str) -> str:
    return writer.op("Transpose", x, perm=[0, 3, 1, 2])
