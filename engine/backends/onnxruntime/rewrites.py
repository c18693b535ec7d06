"""Graphs as ONNX Runtime's CUDA provider computes them in the fewest passes.

Of its two kernels for attention, ONNX's was 17 % off on an H100 in a step of Stable Diffusion 1.5,
or made what is no number; its own is as near to float32 as torch is.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from engine.backends.onnxruntime.argmax import with_float_argmax
from engine.backends.onnxruntime.attention import fuse_attention
from engine.backends.onnxruntime.convolution import with_channels_last
from engine.backends.onnxruntime.group_norm import fuse_group_norms
from engine.backends.onnxruntime.products import with_exact_states, with_weights_as_they_lie
from engine.backends.onnxruntime.splits import with_slices
from engine.backends.onnxruntime.transformer import fuse_transformers
from engine.devices.device import Shape

__all__ = ["REWRITES", "rewritten"]

# What is done to a graph, by name, in this order.
REWRITES: Mapping[str, Callable[[bytes, Mapping[str, Shape]], bytes]] = MappingProxyType(
    {
        "attention": lambda data, _: fuse_attention(data, causal=True),
        "products": with_weights_as_they_lie,
        "argmax": lambda data, _: with_float_argmax(data),
        "exact states": lambda data, _: with_exact_states(data),
        "transformers": fuse_transformers,
        "splits": lambda data, _: with_slices(data),
        "group norms": fuse_group_norms,
        "channels last": with_channels_last,
    }
)


def rewritten(data: bytes, weights: Mapping[str, Shape], *, without: Collection[str] = ()) -> bytes:
    """Return a serialised ModelProto with the provider's own operators.

    weights: the graph's, with their shapes; without: names of `REWRITES` that are left out
    """
    for name, rewrite in REWRITES.items():
        if name not in without:
            data = rewrite(data, weights)
    return data
