import json
from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.backends.openvino.int8 import is_quantized
from engine.backends.settings import BackendSettings
from engine.engines import open_engine, ranges_of
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline, calibration
from runtime import __main__ as command
from tests.support.pictures import psnr
from tests.support.tolerances import INT8_PSNR_DB, INT8_RTOL

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

MODEL = Model.open(find_model("pictogram"))
SETTINGS = BackendSettings(backend="openvino", threads=1)
PROMPTS = ["a red apple", "a house, flat"]
DECODER_DB, FLOATING_DB = 40, 52  # of a decoder in int8, and in bfloat16 or float32, at least


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of graphs where the shipped model has been calibrated, and the file."""
    folder = tmp_path_factory.mktemp("graphs")
    graphs = graph_folders()[-1]
    for file in graphs.glob("*float32.onnx"):
        (folder / file.name).write_bytes(file.read_bytes())
    calibration.calibrate(folder=folder, steps=6, threads=1)
    return folder


def ranges_in(folder, part="step"):
    return json.loads((folder / ranges_of(MODEL)[part]).read_text())


def pipeline(folder, precision, backend="openvino", **fields):
    settings = BackendSettings(backend=backend, threads=1)
    return Pipeline.load(graphs=folder, precision=precision, settings=settings, **fields)


@pytest.mark.parametrize("part", ["step", "vae_decoder"])
def test_every_layer_that_computes_in_int8_has_its_range(folder, part):
    ranges = ranges_in(folder, part)
    graph = find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)
    layers = {n for n, shape in graph.weights.items() if len(shape) > 1 and is_quantized(n)}
    assert ranges.keys() == layers
    assert all(low < 0 < high for low, high in ranges.values())


def test_what_follows_a_silu_is_never_below_its_minimum(folder):
    for name, (low, _) in ranges_in(folder).items():
        if ".resnets." in name and ".conv1." in name:
            assert -0.2785 < low <= -0.27


def test_pictures_are_near_those_of_float32(folder):
    fields = {"seed": 7, "num_inference_steps": 8}
    expected = pipeline(folder, "float32", "cpu")(PROMPTS, **fields).images
    drawn = pipeline(folder, "int8")(PROMPTS, **fields).images
    for actual, picture in zip(drawn, expected, strict=True):
        assert psnr(actual, picture) > INT8_PSNR_DB
        assert actual != picture, "it is not int8"


def test_the_shallow_graph_computes_in_int8_too(folder):
    opened = pipeline(folder, "int8")
    assert opened.engine("step_shallow")._ranges


def test_the_decoder_computes_in_int8_as_far_as_it_may(folder, tmp_path, monkeypatch, capsys):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 8), np.float32)
    exact, rounded = (
        np.asarray(pipeline(folder, precision).decode(latents)[0])
        for precision in ("float32", "int8")
    )
    assert DECODER_DB < psnr(exact, rounded) < FLOATING_DB
    monkeypatch.setattr(calibration, "DECODER_DB", 99.5)
    for file in folder.glob("*float32.onnx"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    options = ["--steps", "1", "--prompt", "a", "--threads", "1", "--graphs", str(tmp_path)]
    assert calibration.main(["pictogram", *options]) == 0
    assert (
        "dB of its own, and 100 are wanted: it stays in floating point" in capsys.readouterr().err
    )
    assert ranges_in(tmp_path, "vae_decoder") == {}
    assert ranges_in(tmp_path)
    kept = pipeline(tmp_path, "int8")
    assert not kept.engine("vae_decoder")._ranges
    assert psnr(exact, np.asarray(kept.decode(latents)[0])) > FLOATING_DB


def test_a_lora_is_taken_and_given_back_bit_for_bit(folder, tmp_path):
    opened = pipeline(folder, "int8")
    fields = {"seed": 7, "num_inference_steps": 2}
    before = opened("a red apple", **fields).images[0]
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = MODEL.find("unet")[f"{module}.weight"].shape
    random = np.random.default_rng(0)
    factors = {
        f"unet.{module}.lora_{end}.weight": random.standard_normal(shape).astype(np.float32)
        for end, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    save_file(factors, tmp_path / "a.safetensors")
    opened.set_loras([tmp_path / "a.safetensors"])
    assert opened("a red apple", **fields).images[0] != before
    opened.set_loras([])
    assert opened("a red apple", **fields).images[0] == before


def test_a_step_is_near_that_of_float32(folder):
    graph = find_graph("step", MODEL.unet, "float32", graph_folders(), MODEL.path)
    weights, ranges = dict(MODEL.weights("step")), ranges_in(folder)
    given = {}
    opened = pipeline(folder, "float32", "cpu")

    class Noting:
        def __init__(self, engine):
            self.engine = engine

        def run(self, inputs):
            given.update(inputs)
            return self.engine.run(inputs)

    opened.engines.opened["step"] = Noting(opened.engine("step"))
    opened("a red apple", seed=1, num_inference_steps=4)
    expected = opened.engines.opened["step"].engine.run(given)["next_registers"]
    engine = open_engine(graph, weights, SETTINGS, "int8", ranges)
    actual = engine.run(given)["next_registers"]
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < INT8_RTOL


def test_the_commands(folder, tmp_path, capsys, monkeypatch):
    arguments = ["pictogram", "--steps", "1", "--prompt", "a", "--threads", "1"]
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "a.png"
    drawing = ["a", "--steps", "1", "--threads", "1", "--seed", "1", "--precision", "int8"]
    drawing += ["--out", str(out)]
    assert command.main(drawing) == 2
    assert "python -m runtime.calibration" in capsys.readouterr().err
    assert calibration.main(arguments) == 0
    written = capsys.readouterr().out.splitlines()
    graphs = tmp_path / "cache" / "graphs"
    assert written == [str(graphs / name) for name in ranges_of(MODEL).values()]
    assert command.main(drawing) == 0
    again = tmp_path / "b.png"
    assert command.main(["--again", str(out), "--out", str(again), "--threads", "1"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_model_that_is_not_there(capsys, tmp_path):
    assert calibration.main([str(tmp_path / "none.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
