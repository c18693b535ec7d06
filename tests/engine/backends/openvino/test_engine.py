import functools
import json
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from engine.backends.openvino import layers as openvino_layers
from engine.backends.settings import BackendSettings, cpu_count
from engine.engines import open_engine
from engine.errors import BackendError, GraphError, ModelError
from engine.graphs.graph import find_graph, graph_folders, signature
from engine.model import Model, find_model
from runtime import Pipeline
from runtime import __main__ as command
from tests.support.pictures import psnr
from tests.support.tolerances import (
    BFLOAT16_PSNR_DB,
    BFLOAT16_RTOL,
    OPENVINO_PSNR_DB,
    OPENVINO_RTOL,
)

if find_spec("openvino") is None:  # an extra; importing it here would report that over the network
    pytest.skip("openvino is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[4]
MODEL = Model.open(find_model("pictogram"))
CPU = BackendSettings(threads=1)
SETTINGS = BackendSettings(backend="openvino", threads=1)
SIZES = {"C": 8, "D": MODEL.unet.cross_attention_dim, "e": 1}
WEIGHTS = {part: dict(MODEL.weights(part)) for part in ("step", "vae_decoder", "text_encoder")}
WEIGHTS["vae_encoder"] = WEIGHTS["vae_decoder"]
BIAS = "decoder.conv_out.bias"


def has_bfloat16():
    from engine.backends.openvino.library import import_library

    return "BF16" in import_library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


BFLOAT16 = pytest.param(
    "bfloat16", marks=pytest.mark.skipif(not has_bfloat16(), reason="no bfloat16 arithmetic")
)


def graph_of(part):
    return find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)


@pytest.fixture
def graph():
    return graph_of("vae_decoder")


@pytest.fixture
def weights():
    return dict(WEIGHTS["vae_decoder"])


def inputs_of(part, **sizes):
    """Draw what a part takes, with these sizes for the symbols of its signature."""
    rng, sizes = np.random.default_rng(0), {"h or 1": 1, "w or 1": 1, **SIZES, **sizes}
    sizes |= {
        "r + 2": sizes.get("r", 0) + 2,
        "H": 8 * sizes.get("h", 0),
        "W": 8 * sizes.get("w", 0),
    }
    drawn = {}
    for name, tensor in signature(part, MODEL.config(part)).inputs.items():
        shape = [sizes.get(symbol, symbol) for symbol in tensor.shape]
        numbers = (
            rng.normal(size=shape) if tensor.dtype == "float32" else rng.integers(200, size=shape)
        )
        drawn[name] = numbers.astype(tensor.dtype)
    if part == "step":
        drawn |= {"timestep": np.linspace(900, 100, sizes["B"], dtype=np.float32)}
        drawn["context"] /= 4  # larger than any text's, the layers that read it round coarsely
    return drawn


def relative_error(actual, expected):
    difference = actual.astype(np.float64) - expected
    return np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64))


def latents(batch=1, side=4):
    return np.random.default_rng(0).normal(size=(batch, 8, side, side)).astype(np.float32)


def draw(engine):
    return engine.run({"latents": latents()})["pixels"]


SHAPES = {
    "text_encoder": [{"B": 1, "n": 8}, {"B": 3, "n": 5}],
    "step": [
        {"B": 1, "g": 2, "r": 1, "h": 8, "w": 8, "n": 8},
        {"B": 3, "g": 1, "r": 3, "h": 4, "w": 12, "n": 4},
        {"B": 2, "g": 3, "r": 2, "h": 16, "w": 8, "n": 9},
    ],
    "vae_decoder": [{"B": 1, "h": 4, "w": 4}, {"B": 3, "h": 8, "w": 2}],
    "vae_encoder": [{"B": 1, "h": 4, "w": 4}, {"B": 3, "h": 8, "w": 2}],
}


@pytest.mark.parametrize("precision", ["float32", BFLOAT16])
@pytest.mark.parametrize("part", SHAPES)
def test_agrees_with_onnx_runtime_at_every_shape(part, precision):
    graph, weights = graph_of(part), WEIGHTS[part]
    expected = open_engine(graph, weights, CPU)
    engine = open_engine(graph, weights, SETTINGS, precision)
    tolerance = {"float32": OPENVINO_RTOL, "bfloat16": BFLOAT16_RTOL}[precision]
    for sizes in SHAPES[part]:
        inputs = inputs_of(part, **sizes)
        actual = engine.run(inputs)
        for name, array in expected.run(inputs).items():
            assert actual[name].dtype == array.dtype
            assert actual[name].shape == array.shape
            error = relative_error(actual[name], array)
            if array.dtype == np.uint8 and precision == "float32":
                assert np.abs(actual[name].astype(int) - array).max() <= 1, "an edge of rounding"
            else:
                assert error < tolerance
                assert precision == "float32" or error > OPENVINO_RTOL, "it is not bfloat16"


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_weights_of_every_type_are_taken(graph, weights, stored):
    weights = {name: array.astype(stored) for name, array in weights.items()}
    same = {name: array.astype(np.float32) for name, array in weights.items()}
    expected, actual = (
        draw(open_engine(graph, same, SETTINGS)),
        draw(open_engine(graph, weights, SETTINGS)),
    )
    np.testing.assert_array_equal(actual, expected)


def test_weights_of_a_mapped_file_are_read_in_place_and_held(graph, weights, monkeypatch):
    component = MODEL.weights("vae_decoder")
    put = {}

    def note(library, model, parameters, weight):
        put[parameters[0].get_friendly_name()] = weight
        return openvino_layers.put_weight(library, model, parameters, weight)

    monkeypatch.setattr("engine.backends.openvino.engine.put_weight", note)
    engine = open_engine(graph, component, SETTINGS)
    held = put.pop("decoder.conv_in.weight")
    assert np.shares_memory(held, component["decoder.conv_in.weight"])
    assert not held.flags.writeable
    put.clear()
    del component, held
    np.testing.assert_array_equal(draw(engine), draw(open_engine(graph, weights, SETTINGS)))


def test_shapes_are_compiled_in_until_others_come(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    small, large = latents(), latents(1, 6)
    first = engine.run({"latents": small})["pixels"]
    compiled = engine._compiled
    assert compiled.inputs[0].partial_shape.is_static
    engine.run({"latents": small})
    assert engine._compiled is compiled
    engine.run({"latents": large})
    for_any = engine._compiled
    assert for_any.inputs[0].partial_shape.is_dynamic
    again = engine.run({"latents": small})["pixels"]
    assert engine._compiled is for_any, "compiled twice and not more"
    assert np.abs(again.astype(int) - first).max() <= 1, "an edge of rounding"


def test_results_are_the_callers(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    first = engine.run({"latents": latents()})["pixels"]
    kept = first.copy()
    engine.run({"latents": -latents()})
    np.testing.assert_array_equal(first, kept)
    assert first.flags.writeable


@pytest.mark.parametrize("precision", ["float32", BFLOAT16])
def test_rebinding_changes_the_results_and_restores_them_bit_for_bit(graph, weights, precision):
    engine = open_engine(graph, weights, SETTINGS, precision)
    before = draw(engine)
    changed = weights | {BIAS: weights[BIAS].astype(np.float32) + 0.5}
    engine.rebind(changed, [BIAS])
    fresh = open_engine(graph, changed, SETTINGS, precision)
    np.testing.assert_array_equal(draw(engine), draw(fresh))
    assert not np.array_equal(draw(engine), before)
    engine.rebind(weights, [BIAS])
    np.testing.assert_array_equal(draw(engine), before)


def test_names_of_other_graphs_change_nothing(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    before, compiled = draw(engine), engine._compiled
    engine.rebind(weights, [])
    engine.rebind(weights | {"not of this graph": np.zeros(3)}, ["not of this graph"])
    np.testing.assert_array_equal(draw(engine), before)
    assert engine._compiled is compiled, "nothing to compile"


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.full(3, np.nan, np.float32), ModelError),
        (np.zeros(4, np.float32), BackendError),
        (np.zeros(3, np.complex64), BackendError),
    ],
    ids=["nan", "shape", "kind"],
)
def test_after_a_bad_weight_the_former_ones_can_be_bound_again(graph, weights, bad, error):
    engine = open_engine(graph, weights, SETTINGS)
    before = draw(engine)
    names = ["decoder.conv_in.bias", BIAS]
    new = weights | {names[0]: np.ones_like(weights[names[0]]), BIAS: bad}
    with pytest.raises(error, match=BIAS):
        engine.rebind(new, names)
    engine.rebind(weights, names)
    np.testing.assert_array_equal(draw(engine), before)


def test_runs_beside_each_other(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    given = [latents(1 + i % 2, 4 + i) for i in range(4)]
    engine.run({"latents": given[0]})  # further shapes come: it is compiled for any
    expected = [engine.run({"latents": array})["pixels"] for array in given[::-1]][::-1]
    results = {}

    def work(i):
        results[i] = [engine.run({"latents": given[i]})["pixels"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pixels in results.items():
        assert all(np.array_equal(array, expected[i]) for array in pixels)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "takes the inputs latents, and none came"),
        ({"latents": latents(), "noise": latents()}, "and latents, noise came"),
        ({"latents": latents()[:, :3]}, r"'latents' as float32 \[\?,8,\?,\?\], and float32"),
        ({"latents": latents()[0]}, r"and float32 \(8, 4, 4\) came"),
        ({"latents": latents().astype("d")}, r"and float64 \(1, 8, 4, 4\) came"),
    ],
)
def test_inputs_that_do_not_fit(graph, weights, inputs, said):
    with pytest.raises(BackendError, match=said) as caught:
        open_engine(graph, weights, SETTINGS).run(inputs)
    assert "\n" not in str(caught.value)


def test_what_the_library_refuses_while_it_runs(graph, weights, monkeypatch):
    engine = open_engine(graph, weights, SETTINGS)
    draw(engine)

    class Full:
        def create_infer_request(self):
            raise RuntimeError(
                "Exception from src/x.cpp:1:\nCheck 'p' failed at y:\nout of memory\n"
            )

    monkeypatch.setattr(engine, "_compiled", Full())
    with pytest.raises(
        BackendError, match=r"OpenVINO failed \(out of memory\); is the picture too"
    ):
        draw(engine)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:1000], "ends early"),
        (lambda data: data.replace(b"Conv", b"Conw"), "No conversion rule .* Conw"),
        (lambda data: b"", "OpenVINO cannot open"),
    ],
    ids=["short", "operator", "empty"],
)
def test_a_damaged_graph(graph, weights, tmp_path, spoil, said):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(spoil(graph.data()))
    with pytest.raises(GraphError, match=said) as caught:
        open_engine(replace(graph, path=path), weights, SETTINGS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_that_wants_other_shapes_than_it_says(graph, weights):
    name = "decoder.conv_in.weight"
    weights[name] = weights[name][:, :, :2]
    lying = replace(graph, weights={**graph.weights, name: weights[name].shape})
    with pytest.raises(GraphError, match=f"'{name}' is .* in it, and .* in its description"):
        open_engine(lying, weights, SETTINGS)


@pytest.mark.parametrize("threads", [1, cpu_count()])
def test_threads(graph, weights, threads):
    engine = open_engine(graph, weights, replace(SETTINGS, threads=threads))
    draw(engine)
    assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == threads


def test_threads_are_as_many_as_processors(graph, weights, monkeypatch):
    monkeypatch.setattr("engine.backends.openvino.engine.cpu_count", lambda: 1)
    engine = open_engine(graph, weights, replace(SETTINGS, threads=None))
    draw(engine)
    assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_processor_without_bfloat16(graph, weights, monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    library = type("Library", (), {"Core": Core})
    monkeypatch.setattr("engine.backends.openvino.engine.import_library", lambda: library)
    with pytest.raises(BackendError, match=r"no bfloat16 arithmetic .*use the precision float32"):
        open_engine(graph, weights, SETTINGS, "bfloat16")


@functools.cache
def pictures(backend, precision="float32"):
    pipeline = Pipeline.load(
        precision=precision, settings=BackendSettings(backend=backend, threads=1)
    )
    prompts = ["a red apple", "a house, flat"]
    return pipeline(prompts, seed=7, num_inference_steps=8).images


@pytest.mark.parametrize("precision", ["float32", BFLOAT16])
def test_a_picture(precision):
    least = {"float32": OPENVINO_PSNR_DB, "bfloat16": BFLOAT16_PSNR_DB}[precision]
    for actual, expected in zip(pictures("openvino", precision), pictures("cpu"), strict=True):
        assert psnr(actual, expected) > least


def test_the_command_line(tmp_path):
    out = tmp_path / "a.png"
    arguments = ["a", "--steps", "1", "--threads", "1", "--seed", "1", "--out", str(out)]
    assert command.main([*arguments, "--backend", "openvino"]) == 0
    assert out.is_file()
    again = tmp_path / "b.png"
    assert command.main(["--again", str(out), "--out", str(again), "--threads", "1"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_nothing_is_sent_and_no_torch_loaded():
    code = """
import json, socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError("the network is used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from engine.backends.settings import BackendSettings
from runtime import Pipeline
Pipeline.load(settings=BackendSettings(backend="openvino", threads=1))("a", num_inference_steps=1)
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(json.loads(done.stdout))
    assert "openvino" in modules
    assert (
        not {"openvino_telemetry", "openvino.tools.ovc", "torch", "onnx", "onnxruntime"} & modules
    )
