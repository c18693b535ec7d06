import gc
import hashlib
import json
import re
import sys
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoints.formats.files import open_weights, require_finite
from engine.checkpoints.formats.float8 import FLOAT8
from engine.checkpoints.formats.tensors import DTYPES, MAX_HEADER
from engine.errors import ModelError

PLAIN_DTYPES = sorted(DTYPES.keys() - {"BF16", *FLOAT8})


def encode(header, data=b""):
    """Lay out a file, whatever nonsense its header holds."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(1,), data_offsets=(0, 1), **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets), **others}


def write(path, content):
    path.write_bytes(content)
    return path


def state_dict():
    generator = np.random.default_rng(3)
    return {
        "conv.weight": generator.normal(size=(2, 3, 3, 1)).astype(np.float32),
        "conv.bias": generator.normal(size=2).astype(np.float16),
        "position_ids": np.arange(5)[None],
        "nothing": np.zeros((0, 4), np.float32),
        "scale": np.array(2.5),
    }


def shards(folder, names_by_file, index=None, name="model.safetensors.index.json"):
    """Write shards of one-byte tensors, and an index that is right unless another is given."""
    for file, names in names_by_file.items():
        header = {name: entry(data_offsets=(i, i + 1)) for i, name in enumerate(names)}
        write(folder / file, encode(header, bytes(range(len(names)))))
    right = {name: file for file, names in names_by_file.items() for name in names}
    write(folder / name, json.dumps({"weight_map": index or right}).encode())
    return folder


def refused(path):
    """The message with which a path is refused; it names the file."""
    with pytest.raises(ModelError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))
    return message


def test_a_state_dict_is_the_references(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict(), path, metadata={"format": "pt"})
    weights = open_weights(path)
    assert dict(weights).keys() == state_dict().keys()
    assert len(weights) == 5
    for name, expected in state_dict().items():
        assert weights[name].dtype == expected.dtype
        assert weights[name].shape == expected.shape
        assert weights.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(weights[name], expected)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
def test_every_dtype_is_the_references(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    bits = np.random.default_rng(1).integers(0, 2, 6 * 8, np.uint8).tobytes()
    data = bits[: 6 * DTYPES[dtype].itemsize]
    write(path, encode({"a": entry(dtype, (2, 3), (0, len(data)))}, data))
    weights, reference = open_weights(path), safetensors.numpy.load_file(path)
    assert weights["a"].dtype == reference["a"].dtype
    assert weights["a"].tobytes() == reference["a"].tobytes() == data


def test_every_bfloat16_is_torchs(tmp_path):
    path = tmp_path / "model.safetensors"
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    safetensors.torch.save_file({"a": every, "scalar": every[100].clone()}, path)
    weights = open_weights(path)
    assert weights.tensors["a"].dtype == "BF16"
    assert weights["a"].dtype == np.float32
    expected = every.view(torch.int16).to(torch.int32).numpy() << 16
    np.testing.assert_array_equal(weights["a"].view(np.int32), expected)
    assert weights["scalar"] == every[100].float().item()
    assert weights["scalar"].shape == ()
    assert not weights["a"].flags.writeable


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict(), path)
    weights = open_weights(path)
    for name in ("conv.weight", "conv.bias", "position_ids", "scale"):
        assert np.shares_memory(weights[name], weights[name])
        assert not weights[name].flags.writeable
        assert weights[name].flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            weights[name][...] = 0


def test_an_array_outlives_its_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict(), path)
    array = open_weights(path)["conv.weight"]
    gc.collect()
    np.testing.assert_array_equal(array, state_dict()["conv.weight"])


def test_opening_and_asking_read_no_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    size = 2**24
    write(path, encode({"a": entry("BF16", (size // 2,), (0, size))}, bytes(size)))
    tracemalloc.start()
    weights = open_weights(path)
    assert "a" in weights
    assert "b" not in weights
    assert weights.tensors["a"].nbytes == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_an_unaligned_tensor_is_copied_to_an_aligned_one(tmp_path):
    header = {"a": entry(), "b": entry("F32", (2,), (1, 9))}
    data = b"\0" + np.array([1.5, -2], "<f4").tobytes()
    for spaces in range(4):
        text = json.dumps(header).encode() + b" " * spaces
        array = open_weights(write(tmp_path / "model.safetensors", encode(text, data)))["b"]
        np.testing.assert_array_equal(array, np.array([1.5, -2], np.float32))
        assert array.flags.aligned
        assert not array.flags.writeable


def test_weights_are_a_mapping_and_equal_only_themselves(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict(), path)
    weights = open_weights(path)
    with pytest.raises(KeyError):
        weights["missing"]
    assert weights.get("missing") is None
    assert weights != open_weights(path)
    assert [weights, weights] == [weights, weights]
    assert {weights, weights} == {weights}
    assert repr(weights) == f"Weights({path}: 5 tensors)"


def test_the_content_hash_is_that_of_the_files(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict(), path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_weights(path).content_hash() == expected
    assert open_weights(tmp_path).content_hash() == expected
    copy = write(tmp_path / "copy.safetensors", path.read_bytes())
    assert open_weights(copy).content_hash() == expected
    write(copy, path.read_bytes()[:-1] + b"\1")
    assert open_weights(copy).content_hash() != expected


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.safetensors", "model.fp16.safetensors"],
        ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"],
        ["diffusion_pytorch_model.fp16.safetensors", "other.safetensors"],
        ["model.fp16.safetensors", "model.bin"],
        ["model.fp16.safetensors", "diffusion_pytorch_model.bin"],
        ["diffusion_pytorch_model.bin", "pytorch_model.bin"],
        ["pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"],
        ["pytorch_model.fp16.bin", "model.bin"],
    ],
)
def test_a_folder_is_searched_in_order(tmp_path, names):
    for i, name in enumerate(names):
        write(tmp_path / name, encode({"a": entry()}, bytes([i])))
    assert open_weights(tmp_path)["a"] == [0]


@pytest.mark.parametrize("name", ["model.safetensors.index", "model.safetensors.index.fp16"])
def test_shards_are_one_checkpoint(tmp_path, name):
    shards(
        tmp_path, {"model-1.safetensors": "ab", "model-2.safetensors": "cd"}, name=f"{name}.json"
    )
    for path in (tmp_path, tmp_path / f"{name}.json"):
        weights = open_weights(path)
        assert {name: int(array[0]) for name, array in weights.items()} == {
            "a": 0,
            "b": 1,
            "c": 0,
            "d": 1,
        }
    joined = b"".join((tmp_path / f"model-{i}.safetensors").read_bytes() for i in (1, 2))
    assert weights.content_hash() == hashlib.sha256(joined).hexdigest()


def test_pickled_shards_are_one_checkpoint(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in ((1, "a"), (2, "b"))}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    write(tmp_path / "pytorch_model.bin.index.json", index)
    assert {name: array.tolist() for name, array in open_weights(tmp_path).items()} == {
        "a": [0],
        "b": [1],
    }


def test_shards_of_the_reference_are_read(tmp_path):
    expected = {f"layer.{i}.weight": torch.full((4, 8), float(i)) for i in range(5)}
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(expected, tmp_path, filename_pattern=pattern, max_shard_size=300)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    weights = open_weights(tmp_path)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())


HEADERS = {
    "empty": (b"", "is empty"),
    "no header": (b"\2\0\0", "first 8 bytes"),
    "header beyond the file": ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes"),
    "header of 2**64 bytes": (b"\xff" * 8 + b"{}", f"{2**64 - 1} bytes"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "no valid JSON"),
    "UTF-16": (encode('{"a": 1}'.encode("utf-16")), "no valid JSON"),
    "not JSON": (encode(b'{"a": '), "no valid JSON"),
    "a very deep list": (encode(b"[" * 200_000), "no valid JSON"),
    "a number of 5000 digits": (encode(b'{"a": ' + b"9" * 5000 + b"}"), "no valid JSON"),
    "a list": (encode([]), "JSON is a list"),
    "a name twice": (encode(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "a field twice": (encode(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "'dtype' is there twice"),
    "metadata of numbers": (encode({"__metadata__": {"step": 1}}), "__metadata__"),
    "metadata without an object": (encode({"__metadata__": 0}), "__metadata__"),
    "an entry that is no object": (encode({"a": 1}), "'a' lacks"),
    "an entry without a shape": (encode({"a": {"dtype": "U8", "data_offsets": []}}), "'a' lacks"),
    "an unknown dtype": (encode({"a": entry("F8")}, b"1"), "dtype 'F8'; supported are"),
    "a dtype that is no text": (encode({"a": entry(dtype=["U8"])}, b"1"), r"dtype \['U8'\]"),
    "a shape that is no list": (encode({"a": {**entry(), "shape": 1}}, b"1"), "shape 1"),
    "a fractional size": (encode({"a": entry(shape=[1.0])}, b"1"), r"shape \[1.0\]"),
    "a true size": (encode({"a": entry(shape=[True])}, b"1"), r"shape \[True\]"),
    "negative sizes": (encode({"a": entry(shape=[-1, -1])}, b"1"), r"shape \[-1, -1\]"),
    "too many dimensions": (encode({"a": entry(shape=[1] * 65)}, b"1"), "shape"),
    "an extent of 2**64": (
        encode({"a": entry(shape=[0, 2**32, 2**32], data_offsets=(0, 0))}),
        "U8",
    ),
    "a huge size": (encode({"a": entry(shape=[2**63])}, b"1"), "shape"),
    "a size that wraps to 1": (encode({"a": entry(shape=[2**62, 4, 1])}, b"1"), "has 1 bytes"),
    "one offset": (encode({"a": entry(data_offsets=[0])}, b"1"), "data_offsets"),
    "offsets that are no list": (encode({"a": {**entry(), "data_offsets": None}}), "offsets None"),
    "negative offsets": (encode({"a": entry(data_offsets=[-1, 0])}, b"1"), "data_offsets"),
    "reversed offsets": (encode({"a": entry(data_offsets=[1, 0])}, b"1"), "data_offsets"),
    "an end beyond the file": (encode({"a": entry(shape=[9], data_offsets=[0, 9])}), "'a' ends at"),
    "a size unlike the shape": (encode({"a": entry("F32", [2], [0, 4])}, b"1234"), "has 4 bytes"),
    "an overlap": (encode({"a": entry(), "b": entry()}, b"1"), "'b', at byte .* overlaps"),
    "nothing inside another": (
        encode({"a": entry(shape=[2], data_offsets=[0, 2]), "b": entry("U8", [0], [1, 1])}, b"12"),
        "'b', at byte .* overlaps",
    ),
    "a hole": (encode({"a": entry(), "b": entry(data_offsets=[2, 3])}, b"123"), "'b'.* a hole"),
    "a hole at the start": (encode({"a": entry(data_offsets=[1, 2])}, b"12"), "'a'.* a hole"),
    "trailing bytes": (encode({"a": entry()}, b"12"), "tensors end at byte"),
    "a long name": (encode({"n" * 100_000: 1}), "'nnn"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_file_is_refused(tmp_path, case):
    content, expected = HEADERS[case]
    path = write(tmp_path / "model.safetensors", content)
    message = refused(path)
    assert path.name in message
    assert re.search(expected, message)


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)  # sparse
    assert f"header of {MAX_HEADER + 1} bytes" in refused(path)


def test_an_index_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(MAX_HEADER + 1)  # sparse
    assert "an index is short" in refused(path)


NOT_CHECKPOINTS = {
    "a bare pickle": (b"\x80\x02}.", "is a bare pickle"),
    "a tar archive of torch": (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "torch before 0.2"),
    "a web page": (b"\n <!DOCTYPE html><html>", "is a web page"),
    "an answer of a server": (b'{"error": "Unauthorized"}', "is a web page"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "the beginning of GGUF": (b"GGUF\3\0\0\0", "its header goes on to byte"),
    "zeros": (bytes(1000), "begins with the bytes 00 00"),
    "text": (b"hello", "begins with the bytes 68 65 6c 6c 6f, and safetensors or"),
}


@pytest.mark.parametrize("case", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(tmp_path, case):
    content, expected = NOT_CHECKPOINTS[case]
    assert expected in refused(write(tmp_path / "pytorch_model.bin", content))
    assert expected in refused(tmp_path)


def test_the_content_tells_the_format_and_not_the_suffix(tmp_path):
    safetensors.numpy.save_file(state_dict(), tmp_path / "model.ckpt")
    assert len(open_weights(tmp_path / "model.ckpt")) == 5
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path)["a"].tolist() == [1, 1]


def test_a_header_may_begin_like_a_pickle(tmp_path):
    text = json.dumps({"a": entry()}).encode().ljust(0x280)
    content = encode(text, b"1")
    assert content.startswith(b"\x80\x02")
    assert list(open_weights(write(tmp_path / "model.ckpt", content))) == ["a"]


@pytest.mark.parametrize("name", ["\ud800", "a\udfff"])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    path = write(tmp_path / "model.safetensors", encode({name: entry()}, b"1"))
    assert "is no valid Unicode" in refused(path)
    header = {"__metadata__": {"title": name}, "a": entry()}
    assert "is no valid Unicode" in refused(write(path, encode(header, b"1")))


def test_names_in_other_scripts_are_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    names = {"<猫>", "string_to_param.*", "\N{ZERO WIDTH JOINER}"}
    safetensors.numpy.save_file(dict.fromkeys(names, np.zeros(1)), path)
    assert open_weights(path).keys() == names


def test_metadata_are_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {"ss_network_dim": "16", "modelspec.title": "Ein Bär\n🐻"}
    safetensors.numpy.save_file(state_dict(), path, metadata=metadata)
    assert open_weights(path).metadata == metadata


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found(tmp_path, dtype, value):
    array = np.full((3, 50_000), np.finfo(dtype).max)
    require_finite(tmp_path, "a.weight", array)
    require_finite(tmp_path, "a.weight", np.arange(3))
    require_finite(tmp_path, "a.weight", array[:0])
    array[2, -1] = value
    for bad in (array, array.T, array[2, -1]):
        with pytest.raises(ModelError, match=r"'a\.weight' holds values that are not finite"):
            require_finite(tmp_path, "a.weight", bad)


def test_a_path_without_weights_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "model.safetensors")
    assert "does not exist" in refused(tmp_path / "model.safetensors.index.json")
    assert "does not exist" in refused(tmp_path / "nul\0byte")
    assert "check the path" in refused(tmp_path / ("n" * 5000)) or sys.version_info > (3, 12)
    (tmp_path / "unet").mkdir()
    write(tmp_path / "unet" / "config.json", b"{}")
    assert "holds no weights; expected is diffusion_pytorch" in refused(tmp_path / "unet")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "model.safetensors", encode({"a": entry()}, b"1"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    assert "Permission denied" in refused(path)


FILE = "model-1.safetensors"
INDEXES = {
    "outside": ({"a": "../x.safetensors"}, "'../x.safetensors', which is no file beside"),
    "an absolute path": ({"a": "/x.safetensors"}, "no file beside"),
    "a path of Windows": ({"a": "..\\x.safetensors"}, "no file beside"),
    "a drive": ({"a": "C:x.safetensors"}, "no file beside"),
    "the folder above": ({"a": ".."}, "no file beside"),
    "the folder": ({"a": "."}, "no file beside"),
    "no name": ({"a": ""}, "no file beside"),
    "a zero byte": ({"a": "x\0"}, "is missing"),
    "a number": ({"a": 1}, "no file beside"),
    "a missing shard": ({"a": FILE, "b": "model-2.safetensors"}, "model-2.safetensors is missing"),
    "a missing tensor": ({"a": FILE, "c": FILE}, "'c' in model-1.safetensors, which does not hold"),
    "itself": ({"a": "model.safetensors.index.json"}, "is no checkpoint"),
    "no object": ([FILE], "weight_map"),
    "nothing": ({}, "weight_map"),
    "an empty shard": ({"a": "model-1.bin"}, "model-1.bin is damaged: it is empty"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_wrong_index_is_refused(tmp_path, case):
    index, expected = INDEXES[case]
    write(tmp_path / "x.safetensors", encode({"a": entry()}, b"1"))
    write(tmp_path / "model-1.bin", b"")
    part = tmp_path / "unet"
    part.mkdir()
    shards(part, {FILE: "ab"})
    write(part / "model-1.bin", b"")
    path = part / "model.safetensors.index.json"
    write(path, json.dumps({"weight_map": index}).encode())
    assert expected in refused(path)
    with pytest.raises(ModelError):
        open_weights(part)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"a": 1}', b'{"a": 1, "a": 1}'])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    assert "damaged" in refused(write(tmp_path / "model.safetensors.index.json", text))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards(tmp_path, {"model-1.safetensors": "ab", "model-2.safetensors": "bc"})
    with pytest.raises(ModelError, match=r"model-2.safetensors .* 'b' is in another shard"):
        open_weights(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path):
    files = {"model-1.safetensors": "a", "model-2.safetensors": "b"}
    shards(tmp_path, files, index={"b": "model-1.safetensors", "a": "model-2.safetensors"})
    with pytest.raises(ModelError, match="which does not hold it"):
        open_weights(tmp_path)


# What a small valid file becomes when bytes change, go or come.
VALID = safetensors.numpy.save(state_dict() | {"ids": np.arange(3, dtype=np.uint8)})
AT = st.integers(0, len(VALID))
DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), AT, st.integers(0, 7)),
        st.tuples(st.just("set"), AT, st.integers(0, 255)),
        st.tuples(st.just("digit"), AT, st.integers(48, 57)),
        st.tuples(st.just("cut"), AT, st.integers(0, 9)),
        st.tuples(st.just("insert"), AT, st.binary(max_size=9)),
        st.tuples(st.just("truncate"), AT, st.none()),
    ),
    min_size=1,
    max_size=4,
)
FUZZ = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def damage(content, kind, at, value):
    content = bytearray(content)
    if kind == "flip" and at < len(content):
        content[at] ^= 1 << value
    elif kind in ("set", "digit") and at < len(content):
        content[at] = value
    elif kind == "cut":
        del content[at : at + value]
    elif kind == "insert":
        content[at:at] = value
    elif kind == "truncate":
        del content[at:]
    return bytes(content)


def check_against_the_reference(path):
    """What opens can be read whole, and is what the reference implementation reads.

    Any other error than ModelError fails the test.
    """
    try:
        weights = open_weights(path)
    except ModelError:
        return
    arrays = dict(weights)
    if any(tensor.dtype == "BF16" for tensor in weights.tensors.values()):
        return  # not in numpy
    reference = safetensors.numpy.load(path.read_bytes())
    assert arrays.keys() == reference.keys()
    for name, array in arrays.items():
        assert array.dtype == reference[name].dtype
        assert array.shape == reference[name].shape
        assert array.tobytes() == reference[name].tobytes()


@FUZZ
@given(DAMAGES)
def test_a_damaged_file_loads_as_the_reference_loads_it_or_is_refused(tmp_path, damages):
    content = VALID
    for each in damages:
        content = damage(content, *each)
    check_against_the_reference(write(tmp_path / "model.safetensors", content))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*PLAIN_DTYPES, "BF16", "F8", "f32", 3]),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)


@FUZZ
@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.integers(0, 16))
def test_any_header_loads_as_the_reference_loads_it_or_is_refused(tmp_path, header, size):
    path = write(tmp_path / "model.safetensors", encode(header, bytes(size)))
    check_against_the_reference(path)


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*PLAIN_DTYPES, "BF16"]), st.lists(st.integers(0, 3), max_size=3)
        ),
        max_size=4,
    )
)
def test_every_valid_file_loads_as_the_reference_loads_it(tmp_path, tensors):
    header, end = {}, 0
    for i, (dtype, shape) in enumerate(tensors):
        begin = end
        end += int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize
        header[str(i)] = entry(dtype, shape, (begin, end))
    path = write(tmp_path / "model.safetensors", encode(header, bytes(end)))
    assert len(open_weights(path)) == len(tensors)
    check_against_the_reference(path)


@FUZZ
@given(st.binary(max_size=60))
def test_any_index_loads_or_is_refused(tmp_path, text):
    index = json.dumps({"weight_map": {"a": FILE}}).encode()
    shards(tmp_path, {FILE: "ab"})
    for content in (text, index[: len(text)] + text + index[len(text) :]):
        path = write(tmp_path / "model.safetensors.index.json", content)
        with suppress(ModelError):
            assert open_weights(path).keys() == {"a", "b"}
