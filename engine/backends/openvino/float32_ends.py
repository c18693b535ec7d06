"""The two ends of an OpenVINO model in float32, where all between computes in bfloat16.

The library leaves in float32 what leads to an output without passing a convolution or a matrix
product, and rounds all else to 8 bits:

- the angles whose sine and cosine tell the timestep, of up to 1000: rounded, they are off by up to
  2, more than half of a circle. So sines and cosines become outputs too, which nobody reads;
- the sampler's product of a few numbers with the latents, and guidance before it, which multiplies
  the difference of two predictions. As products and a sum it is no matrix product.

Of the 11 % by which a guided step of Stable Diffusion 1.5's size differed from float32, this leaves
4.6; `python -m benchmarks bfloat16` has what more would change.
"""

from collections.abc import Collection, Iterator
from typing import Any

from engine.backends.openvino.layers import CONVOLUTION, REARRANGED

WAVES = ("Sin", "Cos")
UNREAD = "unread output of "  # names outputs that are there for what leads to them
PRODUCT = "MatMul"
RANK = 3  # of the arrays of the sampler's product: pictures, registers, numbers


def keep_ends(library: Any, model: Any, weights: Collection[str]) -> None:
    """Have a model's ends compute in float32; weights: the names of those parameters that are."""
    keep_products(library, model, weights)
    keep_waves(library, model)


def keep_products(library: Any, model: Any, weights: Collection[str]) -> None:
    """Have guidance and the sampler compute in float32; see `keep_ends`."""
    ops = library.opset13
    for product in [*_last_products(model, weights)]:
        left, right = (product.input_value(i) for i in range(2))  # (B, r, k) and (B, k, n)
        terms = ops.multiply(ops.unsqueeze(left, [3]), ops.unsqueeze(right, [1]))
        product.output(0).replace(ops.reduce_sum(terms, [2], False).output(0))


def keep_waves(library: Any, model: Any) -> None:
    """Have sines and cosines, with what leads to them, compute in float32."""
    added = []
    for wave in [op for op in model.get_ordered_ops() if op.get_type_name() in WAVES]:
        wave.output(0).get_tensor().set_names({UNREAD + wave.get_friendly_name()})
        added.append(library.opset13.result(wave.output(0)))
    model.add_results(added)


def _last_products(model: Any, weights: Collection[str]) -> Iterator[Any]:
    """Yield the products without weights behind which come no layers."""
    seen: set[str] = set()
    ahead = [result.input_value(0).get_node() for result in model.get_results()]
    while ahead:
        op = ahead.pop()
        name, kind = op.get_friendly_name(), op.get_type_name()
        if name in seen or kind == CONVOLUTION:
            continue
        seen.add(name)
        if kind == PRODUCT:
            if not _is_small(op, weights):
                continue
            yield op
        ahead += [value.get_node() for value in op.input_values()]


def _is_small(product: Any, weights: Collection[str]) -> bool:
    """Tell whether a product is of arrays as the sampler's, none of them a weight."""
    turned = any(product.get_attributes()[name] for name in ("transpose_a", "transpose_b"))
    given = product.input_values()
    return not turned and all(
        len(value.get_partial_shape()) == RANK and _source(value) not in weights for value in given
    )


def _source(value: Any) -> str:
    node = value.get_node()
    while node.get_type_name() in REARRANGED:
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name()
    return name
