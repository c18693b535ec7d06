"""What a GPU does through WebGPU is tried on it, since the library tells nothing of it."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays
from engine.devices.device import Shape
from engine.devices.webgpu import WebGpuDevice, no_adapter
from engine.errors import first_line
from engine.graphs.graph import Precision
from engine.graphs.onnx_bytes import (
    CONTRIB,
    DTYPES,
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_OPSET,
    MODEL_VERSION,
    OPSET_DOMAIN,
    OPSET_VERSION,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_NAME,
    Field,
    encode,
    int_attribute,
    value_info,
    written_node,
)

ASSIGNMENT = "session.record_ep_graph_assignment_info"
OPSET, IR_VERSION = 21, 10
# How far attention may be off, relatively: where it was wrong, it was 20 %.
ATTENTION_RTOL: Mapping[Precision, float] = {"float32": 1e-4, "float16": 1e-2}


def session_options(device: WebGpuDevice) -> Any:
    """Return the options of a session on the device."""
    options = device.library.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.add_session_config_entry(ASSIGNMENT, "1")
    options.add_provider_for_devices([device.ep_device], {"enableInt64": "1"})
    return options


@cache
def has_float16(device: WebGpuDevice) -> bool:
    """Tell whether a GPU computes in float16: a sum of two numbers is tried."""
    found = _tried(device, _sum(), {"x": np.ones(4, np.float16)})
    return found is not None and bool((found == 2).all())


@cache
def has_attention(device: WebGpuDevice, precision: Precision) -> bool:
    """Tell whether the provider's own attention is right on a GPU: one of random numbers is tried.

    It is of more tokens than are in a block of any of its kernels.
    """
    batch, tokens, heads, width = 1, 96, 2, 32
    shape = (batch, tokens, heads * width)
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(shape).astype(precision) for name in "qkv"}
    found = _tried(device, _attention(shape, heads, precision), given)
    q, k, v = (
        array.astype(np.float32).reshape(tokens, heads, width).transpose(1, 0, 2)
        for array in given.values()
    )
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width))
    right = weights / weights.sum(axis=2, keepdims=True) @ v
    right = right.transpose(1, 0, 2).reshape(shape)
    return found is not None and bool(
        np.linalg.norm(found.astype(np.float32) - right)
        < ATTENTION_RTOL[precision] * np.linalg.norm(right)
    )


def _tried(device: WebGpuDevice, model: bytes, inputs: Arrays) -> NDArray[Any] | None:
    """Run a small model; returns its one output, None where the GPU cannot."""
    options = session_options(device)
    options.log_severity_level = 4  # what fails is no error here
    try:
        session = device.library.InferenceSession(model, options)
        (found,) = session.run(None, dict(inputs))
    except Exception as error:  # the library's own exceptions share no base of their own
        if "adapter" in str(error):
            raise no_adapter(first_line(error)) from error
        return None
    made: NDArray[Any] = found
    return made


def _sum() -> bytes:
    """Return a serialised ModelProto that adds an input x of float16, (4,), to itself as y."""
    return _model(written_node(b"Add", [b"x", b"x"], b"y", []), [b"x"], (4,), "float16")


def _attention(shape: Shape, heads: int, precision: Precision) -> bytes:
    """Return a serialised ModelProto of the provider's attention of q, k and v as y.

    shape: of all four, (B, n, heads * d)
    """
    names, settings = [b"q", b"k", b"v"], [int_attribute(b"num_heads", heads)]
    node = written_node(b"MultiHeadAttention", names, b"y", settings, CONTRIB)
    return _model(node, names, shape, precision)


def _model(node: bytes, inputs: Sequence[bytes], shape: Shape, precision: Precision) -> bytes:
    """Write a model of one node, whose inputs and output y have one shape and one type."""
    dims: list[Field] = [(TENSOR_DIMS, size) for size in shape]

    def value(name: bytes) -> bytes:
        return value_info([*dims, (TENSOR_DTYPE, DTYPES[precision]), (TENSOR_NAME, name)])

    graph = [encode(GRAPH_NAME, b"trial"), node, encode(GRAPH_OUTPUT, value(b"y"))]
    graph += [encode(GRAPH_INPUT, value(name)) for name in inputs]
    own = encode(OPSET_DOMAIN, CONTRIB) + encode(OPSET_VERSION, 1)
    model = [encode(MODEL_VERSION, IR_VERSION), encode(MODEL_GRAPH, b"".join(graph))]
    model += [encode(MODEL_OPSET, each) for each in (encode(OPSET_VERSION, OPSET), own)]
    return b"".join(model)
