"""float16 graphs: what is kept in float32, and that numbers which would leave float16 are right."""

import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engine.checkpoints.families.xl import XL
from engine.configs.diffusion import XL_SCALING_FACTOR, AutoencoderConfig, TinyAutoencoderConfig
from engine.graphs.graph import Graph, graph_name
from engine.graphs.onnx_bytes import weights_as_inputs
from engine.shipped import GRAPHS
from export.islands import computed_in
from export.parity import TOLERANCES, relative_error
from export.tracing import example_inputs
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.small_parts import (
    HALF,
    INPAINTING,
    TEXT,
    UNET,
    VAE,
    build,
    weights_of,
)
from tests.support.traced import trace_once

ISLAND = dataclasses.replace(VAE, scaling_factor=XL_SCALING_FACTOR)
LARGEST = 65504
NORMS = ("GroupNormalization", "LayerNormalization")


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


PUBLISHED = {path.name: path for path in sorted(GRAPHS.glob("*-float16.onnx.gz"))}
# These have no attention, or neither that nor norms: the tiny decoder, XL's last block, a hint.
BARE = re.compile("preview_decoder|step_shallow|control_hint")


@pytest.fixture(params=[*HALF, *PUBLISHED])
def model(request):
    """Small graphs as they are traced now, and those of SD 1.5, 2.1 and XL as they ship."""
    if request.param in HALF:
        return trace_once(*HALF[request.param], "float16").model
    return onnx.load_from_string(Graph.read(PUBLISHED[request.param]).data())


def part_of(model):
    return json.loads(model.metadata_props[0].value)["part"]


def is_bare(model):
    """Whether a graph has neither attention nor norms: a part of few layers, or of TAESD's kin."""
    tiny = (
        json.loads(model.metadata_props[0].value)["architecture"] == TinyAutoencoderConfig().key()
    )
    return bool(tiny or BARE.match(part_of(model)))


def dtypes(model):
    """Follow the dtypes through a graph, by the names of its values."""
    fixed = {"Shape": TensorProto.INT64, "ArgMax": TensorProto.INT64, "Less": TensorProto.BOOL}
    known = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        told = attributes(node)
        if node.op_type == "Constant":
            kind = told["value"].data_type
        else:
            kind = known[node.input[1 if node.op_type == "Where" else 0]]
        known |= dict.fromkeys(node.output, told.get("to", fixed.get(node.op_type, kind)))
    return known


def test_every_softmax_is_computed_in_float32(model):
    nodes = [node for node in model.graph.node if node.op_type == "Attention"]
    assert nodes or is_bare(model)
    assert all(attributes(node)["softmax_precision"] == TensorProto.FLOAT for node in nodes)
    assert not [node for node in model.graph.node if node.op_type == "Softmax"]


def test_every_normalisation_keeps_its_statistics_in_float32(model):
    nodes = [node for node in model.graph.node if node.op_type in NORMS]
    assert nodes or is_bare(model)
    assert all(attributes(node).get("stash_type", 1) == TensorProto.FLOAT for node in nodes)


def test_what_moves_between_steps_is_float32(model):
    """And what is computed of it: the waves of a timestep, guidance, the spread, the matrices."""
    known, graph = dtypes(model), model.graph
    at_borders = {known[value.name] for value in [*graph.input, *graph.output]}
    assert TensorProto.FLOAT16 not in at_borders
    summed = {"Sin", "Cos", "Sqrt", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
    taken_apart = {"InstanceNormalization", "Pow", "Erf"}
    nodes = [node for node in graph.node if node.op_type in summed | taken_apart]
    assert nodes or not part_of(model).startswith("step")
    assert {known[node.input[0]] for node in nodes} <= {TensorProto.FLOAT}


def test_autoencoders_that_overflow_are_float32_inside():
    config = AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR)
    for part in ("vae_decoder", "vae_encoder"):
        path = PUBLISHED[f"{graph_name(part, config, 'float16')}.gz"]
        model = onnx.load_from_string(Graph.read(path).data())
        known = dtypes(model)
        inside = {known[node.output[0]] for node in model.graph.node}
        assert TensorProto.FLOAT16 not in inside
        assert {known[name] for name in Graph.read(path).weights} == {TensorProto.FLOAT16}


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


class LayerNormalization(OpRun):
    """As ONNX says it; the onnx library computes in the input's dtype, whatever `stash_type`."""

    def _run(self, x, scale, bias=None, axis=None, epsilon=None, stash_type=None):
        dtype = helper.tensor_dtype_to_np_dtype(stash_type)
        axes = tuple(range(axis % x.ndim, x.ndim))
        size = dtype.type(np.prod(x.shape[axis:]))
        wide = x.astype(dtype)
        centred = wide - wide.sum(axes, keepdims=True) / size
        variance = (centred * centred).sum(axes, keepdims=True) / size
        normal = (centred / np.sqrt(variance + dtype.type(epsilon))).astype(x.dtype) * scale
        return (normal if bias is None else normal + bias,)


def inputs_of(part, config, **sizes):
    sizes = {"B": 2, "g": 1, "r": 1, "n": 6, "e": 1, "h": 4, "w": 4, **sizes}
    return example_inputs(part, config, sizes, torch.Generator().manual_seed(0))


def error(part, config, module, change=None, inputs=None):
    """Compare a float16 graph with the float32 module on weights that float16 has exactly.

    The onnx library evaluates it: every node in the precision that the graph says, where ONNX
    Runtime on a CPU computes in float32 and hides what overflows.
    change: what is done to the graph before, such as taking an island out
    """
    data = weights_as_inputs(trace_once(part, config, "float16").model.SerializeToString())
    model = onnx.ModelProto.FromString(data)
    if change:
        change(model)
    weights = {name: value.astype(np.float16) for name, value in weights_of(module).items()}
    assert all(np.isfinite(value).all() for value in weights.values())
    inputs = inputs_of(part, config) if inputs is None else inputs
    fed = weights | {name: value.numpy() for name, value in inputs.items()}
    with torch.no_grad(), np.errstate(all="ignore"):
        first = module(**inputs)
        expected = first[0] if isinstance(first, tuple) else first
        given = ReferenceEvaluator(model, new_ops=[LayerNormalization]).run(
            None, {value.name: fed[value.name] for value in model.graph.input}
        )
    return relative_error(given[0], expected.numpy())


def output_alone(inputs):
    """Let a step's result be the model's guided output."""
    inputs["matrices"] = torch.tensor([[0.0, 1.0, 0.0]]).expand_as(inputs["matrices"])
    inputs["mask"] = torch.ones_like(inputs["mask"])


def is_lost(error):
    """Tell whether nothing is left of a result; what divides by infinity is 0, and finite."""
    return not error < 0.3


# What becomes of a graph without an island


def half_statistics(model):
    for node in model.graph.node:
        if node.op_type in NORMS:
            kept = [entry for entry in node.attribute if entry.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("stash_type", TensorProto.FLOAT16)])


def half_softmax(model):
    for node in model.graph.node:
        kept = [entry for entry in node.attribute if entry.name != "softmax_precision"]
        del node.attribute[:]
        node.attribute.extend(kept)


def scaled_last(model):
    """Write attention as its paper does: products of queries and keys, then their scale."""
    nodes = []
    for node in model.graph.node:
        nodes += _scaled_last(node) if node.op_type == "Attention" else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _scaled_last(node):
    query, key, value = node.input[:3]
    told, name = attributes(node), node.output[0]
    future = np.triu(np.full((6, 6), -np.inf if told.get("is_causal") else 0, np.float16), 1)
    scale = (TEXT.hidden_size / TEXT.num_attention_heads) ** -0.5  # the default
    constants = {"scale": np.float16(scale), "future": future}
    made = [
        helper.make_node(
            "Constant", [], [f"{name}.{kind}"], value=onnx.numpy_helper.from_array(array)
        )
        for kind, array in constants.items()
    ]
    steps = [
        ("Transpose", [key], "keys", {"perm": [0, 1, 3, 2]}),
        ("MatMul", [query, f"{name}.keys"], "products", {}),
        ("Mul", [f"{name}.products", f"{name}.scale"], "scaled", {}),
        ("Add", [f"{name}.scaled", f"{name}.future"], "masked", {}),
        ("Cast", [f"{name}.masked"], "wide", {"to": TensorProto.FLOAT}),
        ("Softmax", [f"{name}.wide"], "shares", {"axis": -1}),
        ("Cast", [f"{name}.shares"], "narrow", {"to": TensorProto.FLOAT16}),
    ]
    made += [helper.make_node(op, i, [f"{name}.{o}"], **kw) for op, i, o, kw in steps]
    return [*made, helper.make_node("MatMul", [f"{name}.narrow", value], [name])]


def half_at_the_borders(model):
    """Let float16 in where float32 was: sampler, guidance, time; inputs are cast."""
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "to" and entry.i == TensorProto.FLOAT:
                entry.i = TensorProto.FLOAT16
            if entry.type == onnx.AttributeProto.TENSOR:
                _narrow(entry.t)
    for tensor in model.graph.initializer:
        _narrow(tensor)
    for value in [*model.graph.input]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            cast = helper.make_node(
                "Cast", [value.name], [f"{value.name}.half"], to=TensorProto.FLOAT16
            )
            for node in model.graph.node:
                node.input[:] = [cast.output[0] if i == value.name else i for i in node.input]
            model.graph.node.insert(0, cast)


def _narrow(tensor):
    if tensor.data_type == TensorProto.FLOAT:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


# What overflows, or loses too much, without


def autoencoder(config, factor):
    return loud(build("vae_encoder", config).half().float(), factor)


def test_activations_that_leave_float16():
    """The pixels go in as -1 to 1, and come out of the first convolution above 65504."""
    module = autoencoder(ISLAND, 2.0**18)
    assert error("vae_encoder", ISLAND, module) < 1e-5
    without = error("vae_encoder", VAE, autoencoder(VAE, 2.0**18))
    assert not np.isfinite(without), "or this tests nothing"


def test_decoded_activations_that_leave_float16():
    def loud_decoder(config):
        module = build("vae_decoder", config).half().float()
        with torch.no_grad():
            module.model.decoder.conv_in.weight *= 2.0**18
        return module

    assert error("vae_decoder", ISLAND, loud_decoder(ISLAND)) < 1e-2, "bytes"
    assert is_lost(error("vae_decoder", VAE, loud_decoder(VAE)))


def test_group_norms_of_large_activations():
    """Squares of these pass 65504 at once, their sums the more."""
    module = autoencoder(VAE, 2.0**13)
    assert error("vae_encoder", VAE, module) < TOLERANCES["float16"]
    assert is_lost(error("vae_encoder", VAE, module, half_statistics))


def test_layer_norms_of_large_activations():
    """The same of a text encoder, whose hidden states have some channels of hundreds."""
    text = build("text_encoder", TEXT)
    with torch.no_grad():
        text.model.text_model.embeddings.token_embedding.weight *= 2.0**10
    text = text.half().float()
    assert error("text_encoder", TEXT, text) < TOLERANCES["float16"]
    assert is_lost(error("text_encoder", TEXT, text, half_statistics))


@pytest.mark.parametrize(("keys", "lost"), [(65_537, True), (16_384, False)])
def test_attention_to_many_keys(keys, lost):
    """The sum of equal ones is how many there are: 65,536 at 2048 × 2048, 16,384 at 1024²."""
    unet = build("step", INPAINTING)
    with torch.no_grad():
        for name, weight in unet.model.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                weight *= 8
    unet = unet.half().float()
    inputs = inputs_of("step", INPAINTING, n=keys, B=1)
    inputs["context"] = inputs["context"][:, :, :1].expand(-1, -1, keys, -1).clone()
    output_alone(inputs)
    assert error("step", INPAINTING, unet, None, inputs) < TOLERANCES["float16"]
    without = error("step", INPAINTING, unet, half_softmax, inputs)
    assert is_lost(without) if lost else without < TOLERANCES["float16"]


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
    assert is_lost(error("text_encoder", TEXT, text, scaled_last))


def test_scaling_last_changes_nothing_where_nothing_overflows():
    text = build("text_encoder", TEXT).half().float()
    assert error("text_encoder", TEXT, text, scaled_last) < TOLERANCES["float16"]


def after_the_unet(model):
    """Cut a step behind its last convolution, whose output becomes the input `out`."""
    graph, needed, kept = model.graph, {"next_registers"}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            last = "conv_out.weight" in node.input
            kept.append(helper.make_node("Identity", ["out"], node.output) if last else node)
            needed |= set(kept[-1].input)
    inputs = [value for value in graph.input if value.name in needed]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, [None] * 4)
    cut = helper.make_graph(
        kept[::-1], "step", [*inputs, out], graph.output[:1], list(graph.initializer)
    )
    return helper.make_model(cut, opset_imports=model.opset_import, ir_version=model.ir_version)


@pytest.mark.parametrize(("side", "lost"), [(127, False), (128, True)])
def test_the_spread_of_xl_s_latents(side, lost):
    """At 1024 × 1024 there are 65,536 numbers, and how many there are is above 65504."""
    data = Graph.read(PUBLISHED[f"{graph_name('step', XL, 'float16')}.gz"]).data()
    inputs = inputs_of("step", XL, B=1, g=2, h=side, w=side)
    fed = {name: value.numpy() for name, value in inputs.items()}
    fed["out"] = np.random.default_rng(0).standard_normal((2, 4, side, side)).astype(np.float16)
    results = []
    for change in (None, half_at_the_borders):
        model = after_the_unet(onnx.load_from_string(weights_as_inputs(data)))
        if change:
            change(model)
        wanted = {value.name: fed[value.name] for value in model.graph.input}
        with np.errstate(all="ignore"):
            results += ReferenceEvaluator(model).run(None, wanted)
    without = relative_error(results[1], results[0])
    assert np.isfinite(results[0]).all()
    assert not np.isfinite(without) if lost else without < TOLERANCES["float16"]


@pytest.mark.parametrize(("timestep", "loses"), [(981.0, False), (981.3, True)])
def test_timesteps_between_whole_numbers(timestep, loses):
    """float16 has steps of 0.5 there: what is lost is not all, but more than of everything else."""
    unet = build("step", INPAINTING).half().float()
    inputs = inputs_of("step", INPAINTING, h=8, w=8)
    inputs["timestep"] = torch.full((2,), timestep)
    output_alone(inputs)
    within = error("step", INPAINTING, unet, None, inputs)
    without = error("step", INPAINTING, unet, half_at_the_borders, inputs)
    assert (without > 3 * within) == loses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_registers_between_steps(prediction):
    """float16 has their range, even where terminal SNR is 0; it would lose more than the UNet does.

    A model that knows the answer leads 30 steps of Euler to it, with its outputs or all that the
    matrices act on rounded to float16.
    """
    largest, rounded_outputs = euler(prediction, np.float32)
    assert largest < LARGEST
    largest, rounded_registers = euler(prediction, np.float16)
    assert largest < LARGEST
    assert 5 * rounded_outputs < rounded_registers < 1e-3


def euler(prediction, dtype):
    """Return the largest number in the registers of XL's schedule and the error of the last x."""
    zero_snr = prediction == "v_prediction"
    schedule = NoiseSchedule.from_config(
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": zero_snr,
            "timestep_spacing": "trailing" if zero_snr else "leading",
        }
    )
    run = program("euler", schedule, 30)
    x0, noise = np.random.default_rng(0).standard_normal((2, 4 * 64 * 64))
    exact = x = noise * run.initial_noise
    rounded, largest = x.astype(dtype), 0.0
    for matrix, alpha, sigma in zip(
        run.matrices, run.signal_scales, run.noise_scales, strict=False
    ):
        exact = matrix[0] @ [exact, answer(prediction, exact, x0, alpha, sigma), 0 * noise]
        out = answer(prediction, rounded.astype(np.float64), x0, alpha, sigma).astype(np.float16)
        known = np.stack([rounded, out.astype(dtype)])
        largest = max(largest, float(np.abs(known).max()), np.abs(matrix).max())
        moved = matrix[0, :2].astype(dtype).astype(np.float64) @ known.astype(np.float64)
        rounded = moved.astype(dtype)
    return largest, relative_error(rounded, exact)


def answer(prediction, x, x0, alpha, sigma):
    eps = (x - alpha * x0) / sigma
    return eps if prediction == "epsilon" else (alpha * eps - sigma * x0) / np.hypot(alpha, sigma)
