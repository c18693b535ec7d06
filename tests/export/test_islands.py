"""float16 graphs: what is kept in float32, and that numbers which would leave float16 are right."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from engine.config import XL_SCALING_FACTOR, AutoencoderConfig
from engine.onnx_file import weights_as_inputs
from export.islands import computed_in
from export.parity import TOLERANCES, relative_error
from export.tracing import example_inputs
from tests.small_parts import HALF, TEXT, UNET, VAE, build, trace_once, weights_of

ISLAND = dataclasses.replace(VAE, scaling_factor=XL_SCALING_FACTOR)
LARGEST = 65504


def weights_as_inputs_of(model):
    return onnx.load_from_string(weights_as_inputs(model.SerializeToString()))


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


@pytest.fixture(params=HALF)
def model(request):
    return trace_once(*HALF[request.param], "float16").model


@pytest.fixture
def graph(model):
    return model.graph


def test_every_softmax_is_computed_in_float32(graph):
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    assert nodes
    assert all(attributes(node)["softmax_precision"] == TensorProto.FLOAT for node in nodes)
    assert not [node for node in graph.node if node.op_type == "Softmax"], "outside of Attention"


def test_every_normalisation_keeps_its_statistics_in_float32(model, graph):
    kinds = ("GroupNormalization", "LayerNormalization")
    nodes = [node for node in graph.node if node.op_type in kinds]
    assert nodes
    assert all(attributes(node).get("stash_type", 1) == TensorProto.FLOAT for node in nodes)
    taken_apart = {"ReduceMean", "InstanceNormalization", "ReduceSumSquare", "ReduceL2"}
    inferred = onnx.shape_inference.infer_shapes(weights_as_inputs_of(model)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    for node in graph.node:  # the spread that guidance is rescaled to
        assert node.op_type not in taken_apart or kinds[node.input[0]] == TensorProto.FLOAT


def test_float32_graphs_have_no_islands():
    nodes = trace_once("text_encoder", TEXT, "float32").model.graph.node
    assert not [node for node in nodes if "softmax_precision" in attributes(node)]


@pytest.mark.parametrize(
    ("config", "precision", "dtype"),
    [
        (UNET, "float16", torch.float16),
        (UNET, "float32", torch.float32),
        (VAE, "float16", torch.float16),
        (ISLAND, "float16", torch.float32),
        (AutoencoderConfig(), "float16", torch.float16),
    ],
)
def test_what_a_part_is_computed_in(config, precision, dtype):
    assert computed_in(config, precision) == dtype


def test_an_autoencoder_that_overflows_is_float32_inside_and_float16_stored():
    graph = trace_once("vae_encoder", ISLAND, "float16").model.graph
    stored = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert {tensor.data_type for tensor in stored.values()} == {TensorProto.FLOAT16}
    for tensor in stored.values():
        length = next(entry.value for entry in tensor.external_data if entry.key == "length")
        assert int(length) == 2 * np.prod(tensor.dims)
    for node in graph.node:
        if stored.keys() & set(node.input):
            assert node.op_type == "Cast"
            assert attributes(node)["to"] == TensorProto.FLOAT
        assert node.op_type != "Cast" or attributes(node)["to"] != TensorProto.FLOAT16
    inside = [t for t in graph.initializer if t.name not in stored]
    assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in inside}


def loud(module, factor):
    """Make activations large from the first layer to the last norm."""
    with torch.no_grad():
        module.model.encoder.conv_in.weight *= factor
    return module


def inputs_of(part, config):
    sizes = {"B": 2, "g": 1, "r": 1, "n": 6, "e": 1, "h": 4, "w": 4}
    return example_inputs(part, config, sizes, torch.Generator().manual_seed(0))


def error(part, config, module):
    """Compare a float16 graph with the float32 module on weights that float16 has exactly.

    The onnx library evaluates it: every node in the precision that the graph says, where ONNX
    Runtime on a CPU computes in float32 and hides what overflows.
    """
    data = weights_as_inputs(trace_once(part, config, "float16").model.SerializeToString())
    graph = onnx.ModelProto.FromString(data)
    weights = {name: value.astype(np.float16) for name, value in weights_of(module).items()}
    assert all(np.isfinite(value).all() for value in weights.values())
    inputs = inputs_of(part, config)
    fed = weights | {name: value.numpy() for name, value in inputs.items()}
    with torch.no_grad(), np.errstate(all="ignore"):
        first = module(**inputs)
        expected = first[0] if isinstance(first, tuple) else first
        given = ReferenceEvaluator(graph).run(
            None, {value.name: fed[value.name] for value in graph.graph.input}
        )
    return relative_error(given[0], expected.numpy())


def autoencoder(config, factor):
    return loud(build("vae_encoder", config).half().float(), factor)


def test_activations_that_leave_float16():
    """The pixels go in as -1 to 1, and come out of the first convolution above 65504."""
    module = autoencoder(ISLAND, 2.0**18)
    assert error("vae_encoder", ISLAND, module) < 1e-5
    without = error("vae_encoder", VAE, autoencoder(VAE, 2.0**18))
    assert not np.isfinite(without), "or this tests nothing"


def test_norms_of_large_activations():
    """Squares of these pass 65504 at once, their sums the more."""
    assert error("vae_encoder", VAE, autoencoder(VAE, 2.0**13)) < TOLERANCES["float16"]


def largest_product(text, inputs):
    """Return the largest product of a query and a key in the last layer, before it is scaled."""
    attention, seen = text.model.text_model.encoder.layers[-1].self_attn, []
    hooks = [
        layer.register_forward_hook(lambda module, given, out: seen.append(out))
        for layer in (attention.q_proj, attention.k_proj)
    ]
    with torch.no_grad():
        text(**inputs)
    for hook in hooks:
        hook.remove()
    query, key = (out.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for out in seen)
    return float((query @ key.transpose(-1, -2)).abs().max())


def test_attention_of_large_queries_and_keys():
    """The products of these pass 65504 unless they are scaled first."""
    text = build("text_encoder", TEXT)
    inputs = inputs_of("text_encoder", TEXT)
    attention = text.model.text_model.encoder.layers[-1].self_attn
    factor = (1.3 * LARGEST / largest_product(text, inputs)) ** 0.5
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj):
            layer.weight *= factor
            layer.bias *= factor
    text = text.half().float()
    assert LARGEST < largest_product(text, inputs) < 2 * LARGEST
    assert error("text_encoder", TEXT, text) < TOLERANCES["float16"]
