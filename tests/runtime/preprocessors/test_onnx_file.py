"""ONNX files of users: how a picture is given to them, what they give, and hostile ones."""

import json
import struct

import numpy as np
import pytest

from engine.errors import BackendError, RequestError
from runtime.preprocessors import onnx_check
from runtime.preprocessors.choice import find_preprocessor, preprocess
from runtime.preprocessors.onnx_check import check_onnx
from runtime.preprocessors.onnx_file import OnnxPreprocessor

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PIXELS = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
FLOAT, HALF, BYTES = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8


def write(path, nodes, shape, dtype=FLOAT, out=FLOAT, metadata=None, constants=()):
    """Write a file that takes x and gives y."""
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    outputs = [helper.make_tensor_value_info("y", out, None)]
    constants = [numpy_helper.from_array(value, name) for name, value in constants]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path


def node(kind, *inputs, out="y", **attributes):
    return helper.make_node(kind, inputs, [out], **attributes)


OPEN = [1, 3, "H", "W"]
MEAN_OF_CHANNELS = [node("ReduceMean", "x", "axes", keepdims=0)]
AXES = [("axes", np.array([1]))]


def test_one_channel_is_spread_from_black_to_white(tmp_path):
    """A network of depth, of which the mean of the channels is one."""
    path = write(tmp_path / "depth.onnx", MEAN_OF_CHANNELS, OPEN, constants=AXES)
    hint = preprocess(str(path), PIXELS[:32])
    mean = PIXELS[:32].astype("f").mean(axis=2)
    expected = np.rint(255 * (mean - mean.min()) / np.ptp(mean))
    assert np.abs(hint - expected[..., None]).max() <= 1
    inverted = OnnxPreprocessor.load(path, invert=True)(PIXELS[:32])
    assert np.abs(inverted.astype(int) + hint - 255).max() <= 1


@pytest.mark.parametrize("said", ["option", "metadata", "config", "the file's own sides"])
def test_sides_and_normalisation(tmp_path, said):
    """A network that gives back what it is given."""
    mean, std, size = (0.5, 0.25, 0.0), (0.5, 2.0, 1.0), (32, 96)
    metadata = {"mean": "0.5,0.25,0", "std": "0.5,2,1", "size": "32x96"}
    shape = [1, 3, *size] if said == "the file's own sides" else OPEN
    path = write(
        tmp_path / "x.onnx",
        [node("Identity", "x")],
        shape,
        metadata=metadata if said == "metadata" else None,
    )
    config = {"image_mean": mean, "image_std": std, "size": {"height": 32, "width": 96}}
    if said == "config":
        path.with_name("preprocessor_config.json").write_text(json.dumps(config))
    options = {"mean": mean, "std": std} if said in ("option", "the file's own sides") else {}
    options |= {"size": size} if said == "option" else {}
    made = OnnxPreprocessor.load(path, **options)
    given = made.given.array(PIXELS)
    assert (given.shape, given.dtype) == ((1, 3, *size), np.float32)
    plain = OnnxPreprocessor.load(path, mean=[0], std=1, size=size).given.array(PIXELS)
    expected = (plain - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(given, expected, atol=1e-6)
    assert made(PIXELS).shape == PIXELS.shape


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BYTES])
@pytest.mark.parametrize("shape", [OPEN, [1, "H", "W", 3], ["B", 3, None, None]])
def test_layouts_and_dtypes(tmp_path, shape, dtype):
    """What gives the picture back gives the picture: three channels are colours."""
    path = write(tmp_path / "x.onnx", [node("Identity", "x")], shape, dtype=dtype, out=dtype)
    hint = find_preprocessor(str(path))(PIXELS[:32])
    assert np.abs(hint.astype(int) - PIXELS[:32]).max() <= 1


@pytest.mark.parametrize("kind", ["likelihoods", "labels"])
def test_classes_have_colours_of_their_own(tmp_path, kind):
    """Four classes by the brightest of four planes, or by their number."""
    planes = [node("Concat", "x", "ones", axis=1, out="c"), node("Identity", "c")]
    nodes, out = planes, FLOAT
    if kind == "labels":
        nodes = [planes[0], node("ArgMax", "c", axis=1, keepdims=0)]
        out = TensorProto.INT64
    ones = [("ones", np.full((1, 1, 32, 64), 0.6, np.float32))]
    path = write(tmp_path / "seg.onnx", nodes, [1, 3, 32, 64], out=out, constants=ones)
    hint = preprocess(str(path), PIXELS[:32])
    levels = np.concatenate([PIXELS[:32] / 255, np.full((32, 64, 1), 0.6)], axis=2)
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]])
    assert (hint == colours[levels.argmax(2)]).all()


def test_what_is_no_picture_is_refused(tmp_path):
    pairs = [
        (["B", 77], "takes x tensor(float) ['B', 77]; a preprocessor takes one picture"),
        ([1, 4, 8, 8], "a preprocessor takes one picture"),
        ([1, 3, 100_000, 8], "a side of the input of"),
        ([1, 3, 8000, 8000], "up to 4096 x 4096 are given"),
    ]
    for shape, message in pairs:
        path = write(tmp_path / "x.onnx", [node("Identity", "x")], shape)
        with pytest.raises(RequestError) as caught:
            OnnxPreprocessor.load(path)
        assert message in str(caught.value)
    fixed = write(tmp_path / "x.onnx", [node("Identity", "x")], [1, 3, 8, 16])
    with pytest.raises(RequestError, match="takes 16 x 8 pixels and no others, and 9 x 9 are"):
        OnnxPreprocessor.load(fixed, size=(9, 9))
    for options, message in (
        ({"mean": (1, 2)}, "give one number or three"),
        ({"std": 0}, "std of .* is 0; give a number from"),
        ({"mean": "abc"}, "mean of .* is 'abc'; give a number"),
        ({"size": (1, 2, 3)}, r"the size of .* is \[1, 2, 3\]; give a height and a width"),
    ):
        with pytest.raises(RequestError, match=message):
            OnnxPreprocessor.load(fixed, **options)
    said = write(tmp_path / "y.onnx", [node("Identity", "x")], OPEN, metadata={"mean": "a" * 999})
    with pytest.raises(RequestError, match=r"the metadata of .* say that mean is 'aaa"):
        OnnxPreprocessor.load(said)
    for text in ("[", '{"size": {"height": "x", "width": 3}}', '{"image_mean": {}}', "[" * 10**5):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(RequestError):
            OnnxPreprocessor.load(fixed)


def test_what_gives_no_picture_is_refused(tmp_path):
    flat = [node("Flatten", "x")]
    path = write(tmp_path / "x.onnx", flat, [1, 3, 8, 8])
    OnnxPreprocessor.load(path)(PIXELS)  # (1, 192) is a row
    nans = [node("Log", "n"), node("Sub", "x", "two", out="n")][::-1]
    path = write(tmp_path / "n.onnx", nans, OPEN, constants=[("two", np.float32(2))])
    with pytest.raises(BackendError, match="numbers that are not finite"):
        preprocess(str(path), PIXELS)
    text = [node("Cast", "x", to=TensorProto.STRING)]
    path = write(tmp_path / "t.onnx", text, OPEN, out=TensorProto.STRING)
    with pytest.raises(BackendError, match="a preprocessor gives one picture"):
        preprocess(str(path), PIXELS)


def with_external(path, location, kind="initializer"):
    """Write a file that has a tensor in another file, in the graph or within a node's attribute."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    nodes = [node("Add", "x", "w")]
    inputs = [helper.make_tensor_value_info("x", FLOAT, OPEN)]
    outputs = [helper.make_tensor_value_info("y", FLOAT, None)]
    initializers = [tensor] if kind == "initializer" else []
    if kind == "attribute":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    if kind == "branch":
        inner = helper.make_graph(
            [helper.make_node("Identity", ["w"], ["z"])],
            "inner",
            [],
            [helper.make_tensor_value_info("z", FLOAT, [1])],
            [tensor],
        )
        always = numpy_helper.from_array(np.array(True), "always")
        branches = {"then_branch": inner, "else_branch": inner}
        nodes = [helper.make_node("If", ["always"], ["w2"], **branches), node("Add", "x", "w2")]
        initializers = [always]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", ["initializer", "attribute", "branch"])
@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret.bin", "sub/../../secret.bin", "*/_ORT_MEM_ADDR_/*", "", ".", "gone"],
)
def test_tensors_outside_the_files_folder_are_refused(tmp_path, location, kind):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    path = with_external(folder / "x.onnx", location, kind)
    with pytest.raises(RequestError, match=r"has tensors in .*, which is no file of its folder"):
        OnnxPreprocessor.load(path)


def test_a_link_out_of_the_folder_is_refused_and_a_file_in_it_is_read(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    path = with_external(folder / "x.onnx", "link.bin")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(RequestError, match="which is no file of its folder"):
        OnnxPreprocessor.load(path)
    (folder / "link.bin").unlink()
    (folder / "link.bin").write_bytes(struct.pack("<f", 0.25))
    hint = OnnxPreprocessor.load(path)(PIXELS[:32] // 2)
    assert np.abs(hint.astype(int) - PIXELS[:32] // 2 - 64).max() <= 1


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "x.onnx", [node("Identity", "x")], OPEN)
    monkeypatch.setattr(onnx_check, "MAX_BYTES", path.stat().st_size)
    check_onnx(path)
    beside = with_external(tmp_path / "y.onnx", "w.bin")
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    monkeypatch.setattr(onnx_check, "MAX_BYTES", beside.stat().st_size)
    with pytest.raises(RequestError, match="and its tensors have"):
        check_onnx(beside)
    monkeypatch.setattr(onnx_check, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(RequestError, match="bytes; a preprocessor may have"):
        check_onnx(path)


def test_every_truncation_and_random_bytes_are_refused(tmp_path):
    path = write(tmp_path / "x.onnx", MEAN_OF_CHANNELS, OPEN, constants=AXES)
    whole, random = path.read_bytes(), np.random.default_rng(5)
    contents = [whole[:length] for length in range(len(whole))]
    contents += [random.bytes(80) for _ in range(100)] + [b"ORTM" * 20, b"\x3a\x00"]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(RequestError):
            OnnxPreprocessor.load(path)
    with pytest.raises(RequestError, match="cannot be read"):
        OnnxPreprocessor.load(tmp_path)
    with pytest.raises(RequestError, match="No such file"):
        preprocess("nowhere.onnx", PIXELS)
