from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.backends import BackendSettings, open_engine
from engine.graphs import find_graph, graph_folders
from engine.model import Model
from engine.models import find_model
from tests.parity import relative_error
from tests.tolerances import INT8_RTOL, OPENVINO_RTOL, PARITY_RTOL

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from engine.openvino_upsampling import merged_kernel

MODEL = Model.open(find_model("pictogram"))
MERGED, ENLARGING = "Deconvolution", "Interpolate"
IN_DECODER, IN_UNET = 3, 2  # the enlargements of the model that ships


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_the_kernel_is_that_of_both_operations(size):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, *size, generator=generator)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    expected = F.conv2d(F.interpolate(sample, scale_factor=2.0, mode="nearest"), weight, padding=1)
    kernel = torch.from_numpy(merged_kernel(weight.numpy())).transpose(0, 1)
    actual = F.conv_transpose2d(sample, kernel, stride=2, padding=1)
    assert relative_error(actual, expected) < PARITY_RTOL


def opened(part, backend, precision="float32", ranges=None):
    graph = find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)
    settings = BackendSettings(backend=backend, threads=1)
    return open_engine(graph, dict(MODEL.weights(part)), settings, precision, ranges)


def operations(engine):
    """Count the operations of a compiled model, by what the library calls them."""
    nodes = engine._compiled.get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
    return {kind: kinds.count(kind) for kind in (MERGED, ENLARGING)}


def latents(height, width):
    return {"latents": np.random.default_rng(0).standard_normal((1, 4, height, width), np.float32)}


def step_inputs(height, width):
    rng = np.random.default_rng(0)
    return {
        "registers": rng.standard_normal((1, 1, 4, height, width), np.float32),
        "matrices": np.array([[[0, 1, 0]]], np.float32),
        "timestep": np.array([500], np.float32),
        "input_scale": np.ones(1, np.float32),
        "context": rng.standard_normal((2, 1, 8, MODEL.unet.cross_attention_dim), np.float32),
        "guidance": np.array([[-4], [5]], np.float32),
        "guidance_rescale": np.zeros(1, np.float32),
        "noise": np.zeros((1, 4, height, width), np.float32),
        "mask": np.ones((1, 1, height, width), np.float32),
        "outside": np.zeros((1, 3), np.float32),
    }


def test_a_decoder_enlarges_as_it_convolves_at_any_size():
    engine, reference = opened("vae_decoder", "openvino"), opened("vae_decoder", "cpu")
    for size in ((4, 4), (3, 5)):  # compiled for its size, then for any
        actual, expected = (e.run(latents(*size))["pixels"] for e in (engine, reference))
        assert np.abs(actual.astype(int) - expected).max() <= 1
        assert operations(engine) == {MERGED: IN_DECODER, ENLARGING: 0}


@pytest.mark.parametrize(
    ("size", "merged"), [((8, 16), IN_UNET), ((6, 8), 1), ((7, 8), 1), ((8, 5), 0)]
)
def test_a_unet_does_where_every_level_is_twice_the_next(size, merged):
    given = step_inputs(*size)
    engine, reference = opened("step", "openvino"), opened("step", "cpu")
    actual, expected = (e.run(given)["next_registers"] for e in (engine, reference))
    assert relative_error(torch.from_numpy(actual), torch.from_numpy(expected)) < OPENVINO_RTOL
    assert operations(engine) == {MERGED: merged, ENLARGING: IN_UNET - merged}


def test_a_unet_for_any_size_enlarges_first():
    engine = opened("step", "openvino")
    engine.run(step_inputs(8, 8))
    assert operations(engine)[MERGED] == IN_UNET
    engine.run(step_inputs(8, 16))
    assert operations(engine) == {MERGED: 0, ENLARGING: IN_UNET}


def test_int8_where_the_ranges_are_known():
    name, given = "up_blocks.1.upsamplers.0.conv.weight", step_inputs(8, 8)
    engines = [
        opened("step", "cpu"),
        opened("step", "openvino", "bfloat16"),
        opened("step", "openvino", "int8", {name: (-20.0, 20.0)}),
    ]
    exact, plain, rounded = (torch.from_numpy(e.run(given)["next_registers"]) for e in engines)
    assert relative_error(rounded, exact) < INT8_RTOL
    assert relative_error(rounded, plain) > 0
    nodes = engines[-1]._compiled.get_runtime_model().get_ops()
    merged = [n.get_rt_info() for n in nodes if n.get_rt_info()["layerType"].astype(str) == MERGED]
    assert [n["primitiveType"].astype(str).endswith("i8") for n in merged].count(True) == 1
