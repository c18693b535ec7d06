"""A transformer's small passes as ONNX Runtime's CUDA provider has kernels for several at once.

A bias, the residual that it is added to and the layer norm behind are its SkipLayerNormalization,
whose statistics are float32 (by the machine code of 1.31, though not of old versions). The gate of
a feed-forward layer (Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202) is its
BiasSplitGelu, and what is left of bias and residual its BiasAdd; these two were written for Stable
Diffusion, for the widths that it has.
"""

from collections.abc import Mapping

from engine.devices.device import Shape
from engine.graphs.onnx_bytes import (
    CONTRIB,
    INPUT,
    OUTPUT,
    Node,
    Nodes,
    attributes_of,
    named,
    with_own_operators,
    written_node,
)

RESIDUAL_WIDTHS = (320, 640, 1280)
GATED_WIDTHS = (2560, 5120, 10240)  # of both halves
PRODUCTS = (b"MatMul", b"FusedMatMul")


def fuse_transformers(data: bytes, weights: Mapping[str, Shape]) -> bytes:
    """Return a serialised ModelProto whose transformers take fewer passes over their activations.

    The terms of a sum that is fused with the layer norm behind it must have its shape, (B, n, D).
    weights: the graph's, with their shapes
    """
    data = with_own_operators(data, lambda found: _Transformers(found, weights).gated())
    return with_own_operators(data, lambda found: _Transformers(found, weights).summed())


class _Transformers:
    def __init__(self, found: Nodes, weights: Mapping[str, Shape]) -> None:
        self._found = found
        self._weights = weights
        self._makers = {n: i for i, node in found.nodes.items() for n in named(node, OUTPUT)}
        self._readers: dict[bytes, list[int]] = {}
        for i, node in found.nodes.items():
            for name in named(node, INPUT):
                self._readers.setdefault(name, []).append(i)

    def gated(self) -> bytes:
        """Fuse bias, split, GELU and gate."""
        written: dict[int, bytes] = {}
        for split, node in self._found.nodes.items():
            if self._found.kinds[split] != b"Split" or len(named(node, OUTPUT)) != 2:
                continue
            left, right = named(node, OUTPUT)
            gelu, layer = self._only(right, b"Gelu"), self._biased(named(node, INPUT)[0])
            if gelu is None or layer is None or self._width(layer[1]) not in GATED_WIDTHS:
                continue
            (gate,) = named(self._found.nodes[gelu], OUTPUT)
            product = self._only(gate, b"Mul")
            if (
                product is None
                or self._only(left, b"Mul") != product
                or _is_approximate(self._found.nodes[gelu])
            ):
                continue
            (out,) = named(self._found.nodes[product], OUTPUT)
            written[product] = written_node(b"BiasSplitGelu", layer, out, [], CONTRIB)
        return self._found.replaced(written)

    def summed(self) -> bytes:
        """Fuse biases and residuals, with the layer norms behind them where there are any."""
        written: dict[int, bytes] = {}
        for i, node in self._found.nodes.items():
            terms = named(node, INPUT)
            if self._found.kinds[i] != b"Add" or len(terms) != 2:
                continue
            for residual, term in (terms, terms[::-1]):
                layer = self._biased(term)
                if layer is not None and residual.decode() not in self._weights:
                    written |= self._sum(i, layer, residual)
                    break
        return self._found.replaced(written)

    def _sum(self, add: int, layer: list[bytes], residual: bytes) -> dict[int, bytes]:
        (out,) = named(self._found.nodes[add], OUTPUT)
        norms = [
            i for i in self._readers.get(out, ()) if self._found.kinds[i] == b"LayerNormalization"
        ]
        if len(norms) == 1:
            norm = self._found.nodes[norms[0]]
            _, *scale_and_bias = named(norm, INPUT)
            (normed,) = named(norm, OUTPUT)
            epsilon = [a for name, a in attributes_of(norm).items() if name == b"epsilon"]
            inputs = [layer[0], residual, *scale_and_bias, layer[1]]
            fused = written_node(
                b"SkipLayerNormalization", inputs, normed, epsilon, CONTRIB, [b"", b"", out]
            )
            return {add: fused, norms[0]: b""}
        if self._width(layer[1]) in RESIDUAL_WIDTHS:
            return {add: written_node(b"BiasAdd", [*layer, residual], out, [], CONTRIB)}
        return {}

    def _only(self, name: bytes, kind: bytes) -> int | None:
        """Return the one reader of a value, where it is of this kind."""
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and self._found.readers[name] == 1
        return readers[0] if alone and self._found.kinds[readers[0]] == kind else None

    def _biased(self, name: bytes) -> list[bytes] | None:
        """Return the product and the bias whose sum, read once, this value is."""
        i = self._makers.get(name)
        if i is None or self._found.kinds[i] != b"Add" or self._found.readers[name] != 1:
            return None
        terms = named(self._found.nodes[i], INPUT)
        for product, bias in (terms, terms[::-1]):
            maker = self._makers.get(product)
            if self._width(bias) and maker is not None and self._found.kinds[maker] in PRODUCTS:
                return [product, bias]
        return None

    def _width(self, bias: bytes) -> int:
        """Return the length of a weight that is a vector; 0 for anything else."""
        shape = self._weights.get(bias.decode(), ())
        return shape[0] if len(shape) == 1 else 0


def _is_approximate(gelu: Node) -> bool:
    return b"tanh" in attributes_of(gelu).get(b"approximate", b"")
