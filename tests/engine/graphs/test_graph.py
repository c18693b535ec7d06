import contextlib
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import GraphError
from engine.graphs.graph import (
    COMPRESSED,
    METADATA_KEY,
    Graph,
    find_graph,
    graph_folders,
    graph_name,
    signature,
)
from engine.model import Model, find_model

onnx = pytest.importorskip("onnx")

PARTS = ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder")
MODEL = Model.open(find_model("pictogram"))
MODEL_PATH = Path("some") / "model"
DESCRIBED = {
    "part": "step",
    "architecture": MODEL.unet.key(),
    "precision": "float32",
    "inputs": list(signature("step", MODEL.unet).inputs),
    "weights": {"conv_in.weight": [8, 4, 3, 3]},
}
NAME = graph_name("step", MODEL.unet, "float32")


def serialised(described, key=METADATA_KEY, outputs=("next_registers", "deep")):
    """Make a small ONNX file with our description among other metadata."""
    value, *outs = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
        for name in ("x", *outputs)
    )
    nodes = [onnx.helper.make_node("Identity", ["x"], [name]) for name in outputs]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], outs))
    text = described if isinstance(described, str) else json.dumps(described)
    onnx.helper.set_model_props(model, {"author": "someone", key: text})
    return model.SerializeToString()


def write(folder, described=DESCRIBED, name=NAME):
    folder.mkdir(parents=True, exist_ok=True)
    path, data = folder / name, serialised(described)
    path.write_bytes(gzip.compress(data) if path.suffix == COMPRESSED else data)
    return path


def find(*folders, precision="float32"):
    return find_graph("step", MODEL.unet, precision, folders, MODEL_PATH)


def test_read(tmp_path):
    path = write(tmp_path)
    graph = Graph.read(path)
    assert graph == Graph(
        path=path,
        part="step",
        architecture=MODEL.unet.key(),
        precision="float32",
        inputs=tuple(signature("step", MODEL.unet).inputs),
        outputs=("next_registers", "deep"),
        shapes={"x": (1,)},
        weights={"conv_in.weight": (8, 4, 3, 3)},
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_graphs_that_ship(part):
    graph = find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)
    weights = MODEL.weights(part)
    assert graph.weights
    assert set(graph.weights) <= set(weights)
    assert {name: weights[name].shape for name in graph.weights} == graph.weights


@pytest.mark.parametrize(
    ("content", "said"),
    ids=range(14),
    argvalues=[
        (None, "No such file"),
        (b"", "KeyError"),
        (b"hello, this is no graph", "is not a graph of this project"),
        (b"\xff" * 1000, "is not a graph of this project"),
        (serialised(DESCRIBED, key="other"), "KeyError"),
        (serialised("{"), "JSONDecodeError"),
        (serialised("7"), "TypeError"),
        (serialised("[]"), "TypeError"),
        (serialised({}), "KeyError"),
        (serialised(DESCRIBED | {"weights": None}), "items"),
        (serialised(DESCRIBED | {"weights": "conv"}), "items"),
        (serialised(DESCRIBED | {"weights": ["conv_in.weight"]}), "items"),
        (serialised(DESCRIBED | {"weights": {"conv": 3}}), "TypeError"),
        (serialised(DESCRIBED)[:-1], "the file ends early"),
    ],
)
def test_none_of_ours(tmp_path, content, said):
    path = tmp_path / "graph.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=said) as caught:
        Graph.read(path)
    assert str(path) in str(caught.value)
    assert "python -m export" in str(caught.value)


@pytest.mark.parametrize("suffix", ["", COMPRESSED])
def test_every_truncation_and_random_bytes(tmp_path, suffix):
    path, random = write(tmp_path, name=f"graph.onnx{suffix}"), np.random.default_rng(3)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GraphError) as caught:
            Graph.read(path)
        assert "\n" not in str(caught.value)
    for _ in range(200):
        path.write_bytes(random.bytes(60))
        with pytest.raises(GraphError):
            Graph.read(path)


def test_every_changed_byte_of_a_compressed_graph(tmp_path):
    path = write(tmp_path, name=f"graph.onnx{COMPRESSED}")
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        with contextlib.suppress(GraphError):  # the time of the file's making may be any
            assert Graph.read(path).weights


def test_a_compressed_graph_is_found_and_read(tmp_path):
    path = write(tmp_path, name=f"{NAME}{COMPRESSED}")
    graph = find(tmp_path)
    assert graph.path == path
    assert graph.data() == serialised(DESCRIBED)
    plain = write(tmp_path)
    assert find(tmp_path).path == plain, "a graph that was traced here goes first"
    assert find(tmp_path).data() == graph.data()


def test_both_text_encoders_of_a_model_have_one_kind_of_graph():
    config = MODEL.config("text_encoder")
    name = graph_name("text_encoder_2", config, "float32")
    assert name == graph_name("text_encoder", config, "float32")
    model = MODEL.path
    first = find_graph("text_encoder", config, "float32", graph_folders(), model)
    assert find_graph("text_encoder_2", config, "float32", graph_folders(), model) == first


def test_the_first_folder_that_has_it(tmp_path):
    second = write(tmp_path / "second")
    assert find(tmp_path / "first", tmp_path / "second").path == second
    first = write(tmp_path / "first")
    assert find(tmp_path / "first", tmp_path / "second").path == first


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    cached, shipped = graph_folders()
    assert cached == tmp_path / "graphs"
    assert any(shipped.glob("*.onnx"))
    assert graph_folders(tmp_path / "mine") == (tmp_path / "mine",)


def test_the_name_says_part_architecture_and_precision():
    assert graph_name("step", MODEL.unet, "float16") == f"step-{MODEL.unet.key()}-float16.onnx"
    other = replace(MODEL.unet, norm_eps=1e-6)
    assert graph_name("step", other, "float32") != graph_name("step", MODEL.unet, "float32")


@pytest.mark.parametrize("fields", [{"inputs": ["sample", "timestep"]}, {"inputs": []}])
def test_a_graph_of_another_version_is_passed_over(tmp_path, fields):
    write(tmp_path / "old", DESCRIBED | fields)
    current = write(tmp_path / "current")
    assert find(tmp_path / "old", tmp_path / "current").path == current
    with pytest.raises(GraphError, match=r"is of another version\); make it with `python -m exp"):
        find(tmp_path / "old")
    (tmp_path / "old" / NAME).write_bytes(serialised(DESCRIBED, outputs=["next_registers"]))
    assert find(tmp_path / "old", tmp_path / "current").path == current
    described = {name: value for name, value in DESCRIBED.items() if name != "inputs"}
    write(tmp_path / "older", described)
    with pytest.raises(GraphError, match="is of another version"):
        find(tmp_path / "older")


def test_a_missing_graph_names_the_command(tmp_path):
    with pytest.raises(GraphError) as caught:
        find(tmp_path / "a", tmp_path / "b", precision="float16")
    message = str(caught.value)
    assert f"`python -m export {MODEL_PATH} --precision float16`" in message
    assert str(tmp_path / "a") in message
    assert str(tmp_path / "b") in message


def test_an_unknown_precision(tmp_path):
    with pytest.raises(GraphError, match="'int4' is not known; choose float32 or float16"):
        find(tmp_path, precision="int4")


@pytest.mark.parametrize(
    "fields", [{"part": "vae_decoder"}, {"architecture": "0" * 12}, {"precision": "float16"}]
)
def test_a_graph_under_another_name(tmp_path, fields):
    write(tmp_path, DESCRIBED | fields)
    with pytest.raises(GraphError, match="holds another graph than its name says"):
        find(tmp_path)
