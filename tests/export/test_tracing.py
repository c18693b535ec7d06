import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.errors import GraphError, ModelError
from engine.graphs.graph import METADATA_KEY, Graph, signature
from engine.model import Model, find_model
from export.parity import TOLERANCES, check, relative_error
from export.tracing import example_inputs, trace
from export.writing import export_part, load_weights
from tests.support.small_models import SMALL
from tests.support.small_parts import (
    HALF,
    INPAINTING,
    TEXT,
    VAE,
    build,
    weights_of,
)
from tests.support.tolerances import SHALLOW_RTOL
from tests.support.traced import trace_once

SD1, SD2, XL, LCM = (SMALL[name].configs for name in ("sd1", "sd2 base", "xl", "lcm"))
# Those whose pictures `tests/runtime/test_family_parity.py` compares.
PARTS = {
    "text_encoder": ("text_encoder", SD1["text_encoder"]),
    "text_encoder_2": ("text_encoder_2", XL["text_encoder_2"]),
    "step-sd2": ("step", SD2["unet"]),
    "step-xl": ("step", XL["unet"]),
    "step-lcm": ("step", LCM["unet"]),
    "step_shallow-sd2": ("step_shallow", SD2["unet"]),
    "step_shallow-xl": ("step_shallow", XL["unet"]),
    "step_shallow-lcm": ("step_shallow", LCM["unet"]),
    "vae_decoder": ("vae_decoder", VAE),
    "vae_encoder": ("vae_encoder", VAE),
}


@pytest.fixture(scope="module", params=PARTS)
def traced(request):
    return trace_once(*PARTS[request.param], "float32")


def test_graph_computes_what_the_module_computes(traced):
    module = build(traced.part, traced.config)
    assert check(traced, module, weights_of(module)) < TOLERANCES["float32"]


def test_tracing_takes_no_memory_for_weights():
    huge = dataclasses.replace(TEXT, vocab_size=2**40)  # 64 TiB, which no machine here has
    model = trace("text_encoder", huge, "float32").model
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert shapes["text_model.embeddings.token_embedding.weight"] == [2**40, TEXT.hidden_size]


def test_tracing_leaves_no_dtype_behind():
    trace_once("text_encoder", TEXT, "float16")
    assert torch.get_default_dtype() == torch.float32


def test_graph_holds_no_weights_and_names_them_as_the_checkpoint_does(traced):
    described = json.loads(
        next(entry.value for entry in traced.model.metadata_props if entry.key == METADATA_KEY)
    )
    external = {
        tensor.name: list(tensor.dims)
        for tensor in traced.model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    expected = {name: list(shape) for name, shape in traced.config.tensor_shapes().items()}
    assert described["weights"] == external
    assert external.items() <= expected.items()
    if traced.part in ("text_encoder", "step"):
        assert external == expected
    assert described["precision"] == traced.precision == "float32"
    assert described["architecture"] == traced.config.key()
    assert described["part"] == traced.part
    held = sum(len(tensor.raw_data) for tensor in traced.model.graph.initializer)
    assert held < 10_000


def test_inputs_and_outputs_are_those_of_the_signature(traced):
    described = signature(traced.part, traced.config)
    graph = traced.model.graph
    assert [value.name for value in graph.input] == list(described.inputs)
    assert [value.name for value in graph.output] == list(described.outputs)
    for value in graph.input:
        symbols = described.inputs[value.name].shape
        for dim, symbol in zip(value.type.tensor_type.shape.dim, symbols, strict=True):
            assert (dim.dim_param or dim.dim_value) in (symbol, dim.dim_value)


def test_a_graph_that_does_not_agree_is_refused(traced):
    module = build(traced.part, traced.config)
    wrong = {name: value + 0.3 for name, value in weights_of(module).items()}
    with pytest.raises(GraphError, match="it was not written"):
        check(traced, module, wrong)


def test_every_row_of_a_step_has_its_own_matrix_and_guidance(tmp_path):
    path = tmp_path / "step.onnx"
    unet = SD2["unet"]
    path.write_bytes(trace_once("step", unet, "float32").model.SerializeToString())
    weights = weights_of(build("step", unet))
    engine = open_engine(Graph.read(path), weights, BackendSettings(threads=1))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    inputs = {
        "registers": draw(3, 2, 4, 8, 8),
        "matrices": draw(3, 2, 4),
        "timestep": np.array([3, 500, 999], np.float32),
        "input_scale": np.array([1, 0.5, 0.1], np.float32),
        "context": draw(2, 3, 5, unet.cross_attention_dim),
        "guidance": draw(2, 3, 1, 1, 1),
        "guidance_rescale": np.array([0, 0.7, 1], np.float32),
        "noise": draw(3, 4, 8, 8),
        "mask": draw(3, 1, 8, 8),
        "outside": draw(3, 4),
    }
    together = engine.run(inputs)["next_registers"]
    for i in range(3):
        alone = {
            name: value[:, i : i + 1] if name in ("context", "guidance") else value[i : i + 1]
            for name, value in inputs.items()
        }
        assert relative_error(engine.run(alone)["next_registers"], together[i : i + 1]) < 1e-5
    even = np.ascontiguousarray(np.broadcast_to(inputs["guidance"], (2, 3, 1, 8, 8)))
    mapped = engine.run({**inputs, "guidance": even})["next_registers"]
    np.testing.assert_array_equal(mapped, together, "a map of one number is the number")
    even[..., 4:] = 0
    inputs["guidance_rescale"][:] = 0
    halves = engine.run({**inputs, "guidance": even})["next_registers"]
    whole = engine.run(inputs)["next_registers"]
    np.testing.assert_array_equal(halves[..., :4], whole[..., :4])
    assert (halves[..., 4:] != whole[..., 4:]).any()


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (SD2["unet"], "float32"),
        (XL["unet"], "float32"),
        (LCM["unet"], "float32"),
        (INPAINTING, "float16"),
    ],
    ids=["sd2", "xl", "lcm", "inpainting-float16"],
)
def test_a_shallow_step_around_its_own_deep_features_is_the_step(tmp_path, config, precision):
    engines, weights = {}, weights_of(build("step", config))
    for part in ("step", "step_shallow"):
        path = tmp_path / part
        path.write_bytes(trace_once(part, config, precision).model.SerializeToString())
        graph = Graph.read(path)
        engines[part] = open_engine(graph, weights, BackendSettings(threads=1))
    assert len(graph.weights) < len(weights) / 2, "it wants no weights that it does not need"
    sizes = {"B": 3, "g": 2, "r": 2, "n": 5, "h": 8, "w": 12}
    generator = torch.Generator().manual_seed(0)
    inputs = example_inputs("step", config, sizes, generator)
    inputs = {name: value.numpy() for name, value in inputs.items()}
    whole = engines["step"].run(inputs)
    deep, width = whole["deep"], config.block_out_channels[0]
    assert (deep.shape, deep.dtype) == ((2, 3, width, 8, 12), np.float32)
    for features, close in ((deep, True), (deep[:, ::-1].copy(), False)):
        shallow = engines["step_shallow"].run({**inputs, "deep": features})
        assert list(shallow) == ["next_registers"]
        error = relative_error(shallow["next_registers"], whole["next_registers"])
        assert (error < SHALLOW_RTOL) == close


@pytest.mark.parametrize(("part", "config"), HALF.values(), ids=HALF)
def test_float16_graphs_take_and_give_what_float32_graphs_do(part, config):
    traced, module = trace_once(part, config, "float16"), build(part, config)
    types = {
        tensor.data_type
        for tensor in traced.model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert types == {onnx.TensorProto.FLOAT16}
    assert check(traced, module, weights_of(module)) < TOLERANCES["float16"]


def test_a_part_that_does_not_agree_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("export.parity.TOLERANCES", {"float16": 1e-9})
    with pytest.raises(GraphError, match="it was not written"):
        export_part(Model.open(find_model("pictogram")), "text_encoder", "float16", tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused():
    module = build("vae_decoder", VAE)
    weights = weights_of(module)
    load_weights(module.model, weights, "vae_decoder of here")
    del weights["decoder.conv_in.bias"]
    with pytest.raises(ModelError, match=r"vae_decoder of here do not fit.*decoder.conv_in.bias"):
        load_weights(module.model, weights, "vae_decoder of here")


def test_relative_error_of_other_shapes_is_infinite():
    assert relative_error(np.zeros(3), np.zeros(4)) == float("inf")
