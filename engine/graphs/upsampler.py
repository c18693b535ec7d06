"""The graph of a diffusion upsampler: one call of its UNet.

times (2,) float32, the timestep and the level of the low picture's noise; sample (1, X, h, w)
float32, what is denoised and the low picture behind it, by channels -> out (1, C, h, w) float32.
h and w are multiples of the configuration's `multiple`.
"""

import numpy as np

from engine.configs.upsampler import NORM_EPS, NORM_GROUPS, UpsamplerConfig
from engine.graphs.graph import Graph, Precision
from engine.graphs.writer import GraphWriter

__all__ = ["upsampler_graph"]

MAX_PERIOD = 10_000.0


def upsampler_graph(config: UpsamplerConfig, precision: Precision) -> Graph:
    """Write the graph of a diffusion upsampler's UNet."""
    writer = GraphWriter("upsampler", config, precision)
    told = _embedded(writer, config, writer.given("times"))
    x = writer.conv(writer.given("sample"), "conv_in")
    skips = [x]
    down, up = config.down_channels(), config.up_channels()
    for i, blocks in enumerate(down):
        for j, (inputs, outputs) in enumerate(blocks):
            x = _resnet(writer, x, told, f"down_blocks.{i}.resnets.{j}", inputs != outputs)
            skips.append(x)
        if i < len(down) - 1:
            x = _halved(writer, x, f"down_blocks.{i}.downsamplers.0.conv")
            skips.append(x)
    for j in (0, 1):
        x = _resnet(writer, x, told, f"mid_block.resnets.{j}", False)
    for i, blocks in enumerate(up):
        for j, (inputs, outputs) in enumerate(blocks):
            joined = writer.op("Concat", x, skips.pop(), axis=1)
            x = _resnet(writer, joined, told, f"up_blocks.{i}.resnets.{j}", inputs != outputs)
        if i < len(up) - 1:
            x = writer.conv(writer.enlarged(x, 2), f"up_blocks.{i}.upsamplers.0.conv")
    x = _silu(writer, _group_norm(writer, x, "conv_norm_out"))
    writer.give("out", writer.conv(x, "conv_out"))
    return writer.graph()


def _embedded(writer: GraphWriter, config: UpsamplerConfig, times: str) -> str:
    """Embed the timestep and the noise level each by itself, and add them: (1, time channels)."""
    half = config.block_out_channels[0] // 2
    frequencies = np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half)
    rows = writer.op("Reshape", times, writer.whole(2, 1))
    angles = writer.op("Mul", rows, writer.numbers(frequencies[None]))
    waves = writer.op("Concat", writer.op("Cos", angles), writer.op("Sin", angles), axis=1)
    embedded = []
    for row, name in enumerate(("time_embedding", "class_embedding")):
        x = writer.op("Gather", waves, writer.whole(row), axis=0)
        x = _silu(writer, writer.linear(x, f"{name}.linear_1"))
        embedded.append(writer.linear(x, f"{name}.linear_2"))
    return _silu(writer, writer.op("Add", *embedded))  # as every residual block takes it


def _resnet(writer: GraphWriter, x: str, told: str, name: str, widens: bool) -> str:
    """Two convolutions around what is told, beside the input; widens: to other channels."""
    h = writer.conv(_silu(writer, _group_norm(writer, x, f"{name}.norm1")), f"{name}.conv1")
    shift = writer.linear(told, f"{name}.time_emb_proj")
    h = writer.op("Add", h, writer.op("Reshape", shift, writer.whole(1, -1, 1, 1)))
    h = writer.conv(_silu(writer, _group_norm(writer, h, f"{name}.norm2")), f"{name}.conv2")
    return writer.op("Add", writer.conv(x, f"{name}.conv_shortcut") if widens else x, h)


def _group_norm(writer: GraphWriter, x: str, name: str) -> str:
    """Normalise the groups' channels together, then scale and shift every channel."""
    grouped = writer.op("Reshape", x, writer.whole(1, NORM_GROUPS, -1))
    ones, zeros = writer.numbers(np.ones(NORM_GROUPS)), writer.numbers(np.zeros(NORM_GROUPS))
    normal = writer.op("InstanceNormalization", grouped, ones, zeros, epsilon=NORM_EPS)
    x = writer.op("Reshape", normal, writer.op("Shape", x))
    for kind, tensor in (("Mul", "weight"), ("Add", "bias")):
        values = writer.op("Reshape", writer.weight(f"{name}.{tensor}"), writer.whole(-1, 1, 1))
        x = writer.op(kind, x, values)
    return x


def _silu(writer: GraphWriter, x: str) -> str:
    return writer.op("Mul", x, writer.op("Sigmoid", x))


def _halved(writer: GraphWriter, x: str, name: str) -> str:
    """Convolve with a stride of 2, padded all around."""
    tensors = [writer.weight(f"{name}.{kind}") for kind in ("weight", "bias")]
    return writer.op("Conv", x, *tensors, kernel_shape=[3, 3], pads=[1] * 4, strides=[2] * 2)
