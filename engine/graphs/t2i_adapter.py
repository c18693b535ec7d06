"""T2I-Adapters: the graph of one, and a step that takes the features of some (arXiv:2302.08453)."""

from collections.abc import Mapping

import numpy as np

from engine.configs.base import Shape
from engine.configs.t2i_adapter import (
    AdaptedPlace,
    FeatureSumConfig,
    T2IAdapterConfig,
    adapted_places,
)
from engine.errors import GraphError
from engine.graphs.editing import Editor, edited
from engine.graphs.graph import Graph, Precision
from engine.graphs.onnx_bytes import written_node
from engine.graphs.steering import feature_names, sides_of
from engine.graphs.writer import GraphWriter

__all__ = ["adapted", "feature_sum_graph", "t2i_adapter_graph"]


def t2i_adapter_graph(config: T2IAdapterConfig, precision: Precision) -> Graph:
    """Write the graph: squares (1, X, h, w) -> features (1, C, h', w') of every place."""
    writer = GraphWriter("t2i_adapter", config, precision)
    x = writer.given("squares")
    if not config.light:
        x = writer.conv(x, "adapter.conv_in")
    shapes = config.tensor_shapes()
    for i, name in enumerate(feature_names(len(config.channels))):
        block = f"adapter.body.{i}"
        if config.halves[i]:
            x = _halved(writer, config, x, block)
        if f"{block}.in_conv.weight" in shapes:
            x = writer.conv(x, f"{block}.in_conv")
        for j in range(config.num_res_blocks):
            y = writer.op("Relu", writer.conv(x, f"{block}.resnets.{j}.block1"))
            x = writer.op("Add", writer.conv(y, f"{block}.resnets.{j}.block2"), x)
        if config.light:
            x = writer.conv(x, f"{block}.out_conv")
        writer.give(name, writer.op("Identity", x))
    return writer.graph()


def feature_sum_graph(config: FeatureSumConfig) -> Graph:
    """Write the graph that adds an adapter's features, weighed, to a sum: next_ = sum + w own_.

    weights (N, g, B), own_features_i (B, C, h', w'), features_i (g, B, C, h', w'), all float32
    """
    writer = GraphWriter("feature_sum", config, "float32")
    ones = writer.whole(2, 3, 4)
    for i, name in enumerate(feature_names(len(config.channels))):
        weight = writer.op("Gather", "weights", writer.array(np.array(i, np.int64)), axis=0)
        weighed = writer.op("Mul", writer.op("Unsqueeze", weight, ones), f"own_{name}")
        writer.give(f"next_{name}", writer.op("Add", name, weighed))
    return writer.graph()


def _halved(writer: GraphWriter, config: T2IAdapterConfig, x: str, block: str) -> str:
    """Halve the sides; of an odd one the last row counts whole."""
    if config.strided and not config.light:
        name = f"{block}.downsample"
        tensors = [writer.weight(f"{name}.{kind}") for kind in ("weight", "bias")]
        return writer.op("Conv", x, *tensors, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    sides = {"kernel_shape": [2, 2], "strides": [2, 2]}
    return writer.op("AveragePool", x, ceil_mode=1, **sides)


def adapted(data: bytes, weights: Mapping[str, Shape], precision: Precision) -> bytes:
    """Return a step to whose way down features are added; raises GraphError.

    weights: of the step's graph, with their shapes
    """
    places = adapted_places(weights)

    def add(editor: Editor) -> None:
        for name, place in zip(feature_names(len(places)), places, strict=True):
            _add(editor, name, place, precision)

    return edited(data, "adapted", add)


def _add(editor: Editor, name: str, place: AdaptedPlace, precision: Precision) -> None:
    """Add an input to what a module leaves: to all that reads it, the skip included."""
    given = editor.add_input(name, ("g", "B", place.width, *sides_of(place.level)))
    i = _last(editor, place.module)
    out = editor.output(i)
    alone, shape, rows = (out + end for end in (b".alone", b".shape", b".features"))
    nodes = editor.copied(i, alone) + written_node(b"Shape", [alone], shape, [])
    nodes += written_node(b"Reshape", [given, shape], rows, [])
    if precision != "float32":
        nodes += written_node(b"CastLike", [rows, alone], rows + b".cast", [])
        rows += b".cast"
    editor.replace(i, nodes + written_node(b"Add", [alone, rows], out, []))


def _last(editor: Editor, module: str) -> int:
    """Return the node that ends a layer: of a residual block or a transformer its sum."""
    value, is_sum = f"{module}.weight".encode(), not module.endswith("downsamplers.0.conv")
    while True:
        readers = [i for i in editor.found.nodes if value in editor.inputs(i)]
        if len(readers) != 1:
            raise GraphError(
                f"the graph reads {value.decode()!r} {len(readers)} times, so nobody knows where "
                "a T2I-Adapter's features go; make it anew with `python -m export MODEL`"
            )
        (i,) = readers
        is_made = [editor.maker(name) >= 0 for name in editor.inputs(i)]
        if editor.kind(i) == (b"Add" if is_sum else b"Conv") and (all(is_made) or not is_sum):
            return i
        value = editor.output(i)
