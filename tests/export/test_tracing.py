import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from engine.backends import BackendSettings, open_engine
from engine.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from engine.errors import GraphError, ModelError
from engine.graphs import METADATA_KEY, Graph
from engine.signature import SIGNATURES, signature
from export.__main__ import load_weights
from export.parity import TOLERANCES, check, relative_error
from export.tracing import TracedPart, build_module, trace

TEXT = TextEncoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    eos_token_id=49,
)
UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
XL = dataclasses.replace(
    UNET,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=24 + 12,
    time_cond_proj_dim=6,
    use_linear_projection=True,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
PARTS = {
    "text_encoder": ("text_encoder", TEXT),
    "step": ("step", UNET),
    "step-xl": ("step", XL),
    "vae_decoder": ("vae_decoder", VAE),
    "vae_encoder": ("vae_encoder", VAE),
}


@pytest.fixture(scope="module", params=PARTS)
def traced(request):
    torch.manual_seed(0)
    part, config = PARTS[request.param]
    return trace(part, config, "float32", build_module(part, config))


def weights_of(traced: TracedPart) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in traced.module.model.state_dict().items()}


def test_graph_computes_what_the_module_computes(traced):
    assert check(traced, weights_of(traced)) < TOLERANCES["float32"]


def test_graph_holds_no_weights_and_names_them_as_the_checkpoint_does(traced):
    described = json.loads(
        next(entry.value for entry in traced.model.metadata_props if entry.key == METADATA_KEY)
    )
    external = {
        tensor.name
        for tensor in traced.model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    names = {name for name, _ in traced.module.model.named_parameters()}
    assert set(described["weights"]) == external
    assert external <= names
    if traced.part in ("text_encoder", "step"):
        assert external == names
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
    wrong = {name: value + 0.3 for name, value in weights_of(traced).items()}
    with pytest.raises(GraphError, match="it was not written"):
        check(traced, wrong)


def test_every_row_of_a_step_has_its_own_matrix_and_guidance(tmp_path):
    torch.manual_seed(0)
    traced = trace("step", UNET, "float32", build_module("step", UNET))
    path = tmp_path / "step.onnx"
    path.write_bytes(traced.model.SerializeToString())
    engine = open_engine(Graph.read(path), weights_of(traced), BackendSettings(threads=1))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    inputs = {
        "registers": draw(3, 2, 4, 8, 8),
        "matrices": draw(3, 2, 4),
        "timestep": np.array([3, 500, 999], np.float32),
        "input_scale": np.array([1, 0.5, 0.1], np.float32),
        "context": draw(2, 3, 5, 16),
        "guidance": draw(2, 3),
        "noise": draw(3, 4, 8, 8),
    }
    together = engine.run(inputs)["next_registers"]
    for i in range(3):
        alone = {
            name: value[:, i : i + 1] if name in ("context", "guidance") else value[i : i + 1]
            for name, value in inputs.items()
        }
        assert relative_error(engine.run(alone)["next_registers"], together[i : i + 1]) < 1e-5


@pytest.mark.parametrize("part", SIGNATURES)
def test_float16_graphs_take_and_give_what_float32_graphs_do(part):
    torch.manual_seed(0)
    config = {"text_encoder": TEXT, "step": UNET}.get(part, VAE)
    traced = trace(part, config, "float16", build_module(part, config))
    weights = weights_of(traced)
    assert all(value.dtype == np.float16 for value in weights.values())
    assert check(traced, weights) < TOLERANCES["float16"]


def test_weights_of_another_model_are_refused(tmp_path):
    module = build_module("vae_decoder", VAE).model
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    load_weights(module, weights, tmp_path)
    del weights["decoder.conv_in.bias"]
    with pytest.raises(ModelError, match=r"do not fit its config.json .*decoder.conv_in.bias"):
        load_weights(module, weights, tmp_path)


def test_relative_error_of_other_shapes_is_infinite():
    assert relative_error(np.zeros(3), np.zeros(4)) == float("inf")
