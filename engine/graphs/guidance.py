"""Guidance that no weighted sum of a step's outputs is, as changes of the step's graph.

Legend
    cond, uncond   what the UNet gives with the text and without it
    x0(out)        the picture that follows from an output: a x + b out
    mean, diff     sums of the outputs with the weights `guidance` and `update`

Perturbed attention (Ahn et al. 2024, arXiv:2403.17377, section 4): in some groups of the
conditioning the middle's self-attention gives its values and looks nowhere.

Projected guidance (Sadat et al. 2024, arXiv:2410.02416, algorithm 1) takes in the place of
cond + (s - 1) diff

    d = b diff + memory,  d' = d min(1, threshold / |d|),  d' = parallel to x0(mean) + orthogonal
    out = mean + (s - 1) / b (orthogonal + eta parallel)

and adds d, which is remembered, and uncond to what a step's matrices act on.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from engine.errors import GraphError
from engine.graphs.editing import Editor, edited
from engine.graphs.graph import Tensor
from engine.graphs.onnx_bytes import int_attribute, written_node

__all__ = ["GUIDED_INPUTS", "PERTURBED_INPUTS", "guided", "has_attention_to_perturb", "perturbed"]


def _tensor(*shape: str | int) -> Tensor:
    return Tensor(dtype="float32", shape=shape)


PERTURBED_INPUTS: Mapping[str, Tensor] = {"perturbed": _tensor("g", "B")}  # 1 where it is, else 0
GUIDED_INPUTS: Mapping[str, Tensor] = {
    "update": _tensor("g", "B", 1, "h or 1", "w or 1"),
    # a, b, eta, the threshold and (s - 1) / b
    "projection": _tensor("B", 5),
    # what each register counts in the memory
    "recalled": _tensor("B", "r"),
    # what uncond and d add to each register, and to what is outside a mask
    "directions": _tensor("B", "r + 1", 2),
}
MIDDLE = re.compile(rb"mid_block\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_v\.weight")
BOOLEAN = 9  # of TensorProto.DataType
TINY = np.float32(1e-12)  # as torch's `normalize`: the minimum of what is divided by


def has_attention_to_perturb(weights: Sequence[str] | Mapping[str, object]) -> bool:
    """Tell by its weights' names whether a UNet's middle attends to itself."""
    return any(MIDDLE.fullmatch(name.encode()) for name in weights)


def perturbed(data: bytes) -> bytes:
    """Return a step whose middle's self-attention may be left out; raises GraphError."""
    return edited(data, "perturbed", _perturb)


def _perturb(editor: Editor) -> None:
    chosen = editor.add_input("perturbed", PERTURBED_INPUTS["perturbed"].shape)
    rows, is_chosen = b"perturbed.rows", b"perturbed.chosen"
    shaped = written_node(b"Reshape", [chosen, editor.whole(-1, 1, 1)], rows, [])
    first = shaped + written_node(b"Cast", [rows], is_chosen, [int_attribute(b"to", BOOLEAN)])
    for i in editor.found.nodes:
        if editor.kind(i) != b"Attention":
            continue
        values = _values(editor, editor.inputs(i)[2])
        if values is None:
            continue
        turned = editor.reader(editor.output(i), b"Transpose", first=True)
        joined = editor.reader(editor.output(turned), b"Reshape", first=True)
        out = editor.output(joined)
        nodes = editor.copied(joined, out + b".attended")
        nodes += first
        nodes += written_node(b"Where", [is_chosen, values, out + b".attended"], out, [])
        editor.replace(joined, nodes)
        first = b""
    if first:
        raise GraphError(
            "the UNet's middle attends to nothing, so there is no attention to perturb; leave "
            "pag_scale out"
        )


def _values(editor: Editor, split: bytes) -> bytes | None:
    """Return a middle's values (B, n, heads * d) before they are split; None for another's."""
    turned = editor.maker(split)
    shaped = editor.maker(editor.inputs(turned)[0]) if turned >= 0 else -1
    if shaped < 0 or editor.kind(shaped) != b"Reshape":
        return None
    whole = editor.inputs(shaped)[0]
    product = editor.maker(whole)
    if product < 0 or editor.kind(product) != b"MatMul":
        return None
    weight = editor.inputs(product)[1]
    while (maker := editor.maker(weight)) >= 0:
        weight = editor.inputs(maker)[0]
    return whole if MIDDLE.fullmatch(weight) else None


def guided(data: bytes) -> bytes:
    """Return a step with projected guidance and a column for uncond; raises GraphError."""
    return edited(data, "guided", _guide)


def _guide(editor: Editor) -> None:
    for name, tensor in GUIDED_INPUTS.items():
        editor.add_input(name, tensor.shape)
    weighed = editor.reader(b"guidance", b"Mul", first=True)
    outputs = editor.inputs(weighed)[1]
    summed = editor.reader(editor.output(weighed), b"ReduceSum", first=True)
    known = editor.reader(b"registers", b"Concat", first=True)
    flat = editor.reader(editor.output(known), b"Reshape", first=True)
    moved = editor.reader(editor.output(flat), b"MatMul")
    editor.replace(summed, _projected(editor, summed, outputs))
    editor.replace(moved, _directed(editor, moved, outputs))


class _Nodes:
    """Nodes that are written one behind the other; each is named after a prefix."""

    def __init__(self, editor: Editor, prefix: str) -> None:
        self.written = b""
        self._editor = editor
        self._prefix = prefix.encode()
        self._count = 0

    def op(self, kind: str, *inputs: bytes, out: bytes = b"", **attributes: int) -> bytes:
        """Write a node; returns its value."""
        self._count += 1
        out = out or b"%s.%d" % (self._prefix, self._count)
        given = [int_attribute(name.encode(), value) for name, value in attributes.items()]
        self.written += written_node(kind.encode(), inputs, out, given)
        return out

    def number(self, place: int) -> bytes:
        """Take one number a picture of `projection`, as (B, 1, 1, 1)."""
        one = self.op("Gather", b"projection", self._editor.whole(place), axis=1)
        return self.op("Unsqueeze", one, self._editor.whole(2, 3))


def _projected(editor: Editor, summed: int, outputs: bytes) -> bytes:
    """Write the mean of the outputs, and the guided output in its place; d is `guided.d`."""
    nodes, out, mean = _Nodes(editor, "guided"), editor.output(summed), b"guided.mean"
    nodes.written = editor.copied(summed, mean)
    each, one = editor.whole(1, 2, 3), editor.whole(1)
    x_scale, out_scale, eta, threshold, strength = (nodes.number(place) for place in range(5))
    tiny = editor.constant(np.array([TINY]))
    x = nodes.op("Gather", b"registers", editor.constant(np.array(0, np.int64)), axis=1)
    pieces = nodes.op("Mul", b"update", outputs)
    diff = nodes.op("ReduceSum", pieces, editor.whole(0), keepdims=0)
    flat = nodes.op("Reshape", b"registers", editor.whole(0, 0, -1))
    remembered = nodes.op("MatMul", nodes.op("Unsqueeze", b"recalled", one), flat)
    memory = nodes.op("Reshape", remembered, nodes.op("Shape", diff))
    step = nodes.op("Add", nodes.op("Mul", out_scale, diff), memory, out=b"guided.d")
    length = nodes.op("Max", nodes.op("ReduceL2", step, each, keepdims=1), tiny)
    limit = nodes.op("Min", nodes.op("Div", threshold, length), editor.constant(np.ones(1, "f")))
    step = nodes.op("Mul", step, limit)
    picture = nodes.op("Add", nodes.op("Mul", x_scale, x), nodes.op("Mul", out_scale, mean))
    reach = nodes.op("Max", nodes.op("ReduceL2", picture, each, keepdims=1), tiny)
    unit = nodes.op("Div", picture, reach)
    along = nodes.op("ReduceSum", nodes.op("Mul", step, unit), each, keepdims=1)
    less = nodes.op("Sub", eta, editor.constant(np.ones(1, "f")))
    update = nodes.op("Add", step, nodes.op("Mul", nodes.op("Mul", less, along), unit))
    nodes.op("Add", mean, nodes.op("Mul", strength, update), out=out)
    return nodes.written


def _directed(editor: Editor, moved: int, outputs: bytes) -> bytes:
    """Write the product of a step's matrices, and what uncond and d add to it."""
    nodes, out, plain = _Nodes(editor, "directed"), editor.output(moved), b"directed.plain"
    nodes.written = editor.copied(moved, plain)
    one, flat = editor.whole(1), editor.whole(0, 0, -1)
    uncond = nodes.op("Gather", outputs, editor.constant(np.array(0, np.int64)), axis=0)
    both = [nodes.op("Unsqueeze", value, one) for value in (uncond, b"guided.d")]
    columns = nodes.op("Reshape", nodes.op("Concat", *both, axis=1), flat)
    nodes.op("Add", plain, nodes.op("MatMul", b"directions", columns), out=out)
    return nodes.written
