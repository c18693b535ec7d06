import argparse
import collections
import datetime
import enum
import functools
import hashlib
import pathlib
import struct
import sys
import tracemalloc
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch

from engine.checkpoints.formats.files import open_weights
from engine.errors import ModelError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def saved(path, value, **options):
    """Save a value, and open it; its tensors are compared with what torch.load gives."""
    torch.save(value, path, **options)
    return open_weights(path)


def agrees(weights, name, expected):
    """Compare a tensor with torch's, bit for bit."""
    array = weights[name]
    expected = expected.detach()
    if expected.dtype == torch.bfloat16:
        expected = expected.float()
    assert array.shape == expected.shape == weights.tensors[name].shape
    assert array.dtype == expected.numpy().dtype
    assert array.tobytes() == expected.numpy().tobytes()
    assert array.flags.aligned
    assert not array.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_torchs(tmp_path, dtype):
    numbers = torch.tensor([[0, 1, 2], [3, 100, 1]]).to(dtype)
    path = tmp_path / "model.pt"
    weights = saved(path, {"a": numbers, "scalar": numbers[1, 1], "empty": numbers[:0]})
    assert weights.tensors["a"].dtype == DTYPES[dtype]
    assert weights.tensors["a"].nbytes == numbers.nbytes
    loaded = torch.load(path, weights_only=True)
    for name in ("a", "scalar", "empty"):
        agrees(weights, name, loaded[name])


def test_views_are_torchs(tmp_path):
    base = torch.arange(120).reshape(2, 3, 4, 5)
    views = {
        "transposed": base.transpose(1, 3),
        "a slice": base[:, 1:, 1::2, ::3],
        "a part": base[1],
        "permuted halves": base.half().permute(3, 0, 1, 2),
        "transposed bfloat16": base.bfloat16().transpose(0, 3),
        "expanded": torch.tensor([[1.5], [2.5]]).expand(2, 7),
        "expanded bfloat16": torch.ones(1, 1, dtype=torch.bfloat16).expand(3, 5),
        "channels last": base.float().to(memory_format=torch.channels_last),
        "the diagonal": base.reshape(12, 10).diagonal(),
        "windows": torch.arange(10).unfold(0, 4, 1),
        "odd strides of one": torch.as_strided(base, (1, 5), (1000, 1), 7),
        "empty with strides": torch.as_strided(base, (0, 5), (1000, 1), 100),
        "0-d": base[1, 1, 1, 1],
    }
    path = tmp_path / "model.ckpt"
    weights = saved(path, views)
    loaded = torch.load(path, weights_only=True)
    assert weights.keys() == views.keys()
    for name in views:
        agrees(weights, name, loaded[name])
    assert weights.tensors["a part"].strides is None
    assert weights.tensors["odd strides of one"].strides is None
    assert weights.tensors["transposed"].strides == (60, 1, 5, 20)
    for name in ("transposed", "a slice", "permuted halves", "windows", "channels last"):
        assert np.shares_memory(weights[name], weights[name])


def test_tied_tensors_share_their_bytes(tmp_path):
    tied = torch.randn(4, 2)
    weights = saved(tmp_path / "model.bin", {"a": tied, "b": tied, "c": tied.t()})
    assert np.shares_memory(weights["a"], weights["b"])
    assert np.shares_memory(weights["a"], weights["c"])
    agrees(weights, "c", tied.t())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_modules_state_dict_is_torchs(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / "model.bin"
    weights = saved(path, module.state_dict(), pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=False)
    assert list(weights) == list(loaded)
    for name in loaded:
        agrees(weights, name, loaded[name])
    weights = saved(path, dict(module.named_parameters()), pickle_protocol=protocol)
    for name, parameter in module.named_parameters():
        agrees(weights, name, parameter)


def test_parameters_with_attributes_are_read(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = "of training"
    agrees(saved(tmp_path / "a.pt", {"p": parameter}), "p", parameter)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint_gives_its_state_dict(tmp_path, monkeypatch, protocol):
    class ModelCheckpoint:
        pass

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = ModelCheckpoint
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    network = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 6,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {**network.state_dict(), "model_ema.num_updates": torch.tensor(7)},
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "monitor": None}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 3}],
        "loss": np.float64(0.25),
        "seeds": {np.int32(3), 2**127},
        "precision": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "bytes": b"\xff\0",
    }
    weights = saved(tmp_path / "last.ckpt", checkpoint, pickle_protocol=protocol)
    assert list(weights) == ["weight", "bias", "model_ema.num_updates"]
    agrees(weights, "weight", network.weight)
    assert {name: weights.metadata[name] for name in ("epoch", "global_step", "loss")} == {
        "epoch": "6",
        "global_step": "470000",
        "loss": "0.25",
    }
    assert weights.metadata["pytorch-lightning_version"] == "1.4.2"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_textual_inversion_is_flattened(tmp_path, protocol):
    vectors = torch.randn(2, 768)
    value = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)}),
        "name": "lighthouse",
        "step": 500,
        "sd_checkpoint": None,
        "layers": [torch.zeros(1), (torch.ones(1),)],
    }
    weights = saved(tmp_path / "a.pt", value, pickle_protocol=protocol)
    assert list(weights) == ["string_to_token.*", "string_to_param.*", "layers.0", "layers.1.0"]
    agrees(weights, "string_to_param.*", vectors)
    assert weights["string_to_token.*"] == 265
    assert weights.metadata == {"name": "lighthouse", "step": "500"}


NUMBERS = [
    *(np.dtype(kind).type(3) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")),
    *(np.dtype(kind).type(-1.5) for kind in ("f2", "f4", "f8")),
    np.bool_(True),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.dtype.str)
@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_are_numbers(tmp_path, number, protocol):
    weights = saved(tmp_path / "a.pt", {"n": number}, pickle_protocol=protocol)
    assert weights.metadata == {"n": str(number.item())}


@pytest.mark.parametrize("protocol", [2, 4])
def test_texts_of_numpy_are_texts(tmp_path, protocol):
    texts = {"a": np.str_("v1.5 \N{SNOWMAN}"), "b": np.bytes_(b"v2"), "c": np.array(["x"])}
    weights = saved(tmp_path / "a.pt", texts, pickle_protocol=protocol)
    assert weights.metadata == {"a": "v1.5 \N{SNOWMAN}", "b": "v2"}
    assert not weights.tensors


ARRAYS = [
    *(np.arange(6).astype(kind).reshape(2, 3) for kind in ("?", "u1", "i8", "f2", "f4", "f8")),
    np.arange(6, dtype=np.float32).reshape(2, 3).T,  # by columns
    np.arange(4, dtype=">f4"),
    np.array(2.5),
    np.zeros((0, 3), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_numpy_are_tensors(tmp_path, array, protocol):
    weights = saved(tmp_path / "a.pt", {"a": array}, pickle_protocol=protocol)
    assert weights["a"].dtype == array.dtype.newbyteorder("<")
    assert np.array_equal(weights["a"], array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_a_macs_gpu_are_read(tmp_path, dtype):
    """As torch writes those of a device that has no storages of its own."""
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3)

    class OnADevice:
        def __reduce__(self):
            whole = tensor.float() if dtype == torch.bfloat16 else tensor
            rebuild = torch._utils._rebuild_device_tensor_from_numpy
            return rebuild, (whole.numpy(), dtype, "mps", False)

    weights = saved(tmp_path / "a.pt", {"string_to_param": {"*": OnADevice()}})
    assert np.array_equal(weights["string_to_param.*"], tensor.float().numpy())


class Settings(dict):
    """What nobody but its program knows."""


class Precision(enum.Enum):
    HALF = 16
    WHOLE = 32


OBJECTS = {
    "a dictionary of a class": Settings(scale=0.18215, deep=Settings(lr=1e-4)),
    "a namespace": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a/b")),
    "a partial call": functools.partial(torch.optim.AdamW, lr=1e-4),
    "members of an enumeration": {Precision.HALF: 1, Precision.WHOLE: Precision.HALF},
    "a counter": collections.Counter("abc"),
    "a date": datetime.datetime(2024, 1, 2),
    "a module": torch.nn.Linear(2, 2),
    "a slice and a complex number": [slice(1, 2), 1j],
    "objects of numpy": np.array([None, "a"], dtype=object),
    "a time of numpy": np.datetime64("2024-01-02"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_objects_beside_the_state_dict_are_skipped(tmp_path, value, protocol):
    state = {"w": torch.ones(2)}
    path = tmp_path / "a.ckpt"
    weights = saved(path, {"hyper": value, "state_dict": state}, pickle_protocol=protocol)
    assert list(weights) == ["w"]
    nested = saved(path, {"settings": {"deep": [value]}, "model": state}, pickle_protocol=protocol)
    assert "model.w" in list(nested)


def test_a_skipped_object_is_named(tmp_path):
    value = {"hyper": Settings(), "state_dict": {"w": torch.ones(2)}}
    weights = saved(tmp_path / "a.ckpt", value)
    assert weights.metadata == {"hyper": f"an object that is not read: {__name__}.Settings"}


@pytest.mark.parametrize("place", ["among tensors", "the state dict", "alone"])
def test_an_object_where_tensors_are_needed_is_refused(tmp_path, place):
    made = Settings(w=torch.ones(2))
    values = {
        "among tensors": {"state_dict": {"w": torch.ones(2), "b": made}},
        "the state dict": {"state_dict": made, "other": {"w": torch.ones(2)}},
        "alone": {"state_dict": {}, "other": made},
    }
    torch.save(values[place], tmp_path / "a.ckpt")
    assert f"names {__name__}.Settings" in refused(tmp_path / "a.ckpt")


def test_a_number_of_another_byte_order_is_read(tmp_path):
    path = tmp_path / "a.pt"
    write_archive(path, pickled=b"}X\1\0\0\0n" + numpy_number(">", b"\x3f\xf8" + bytes(6)) + b"s.")
    assert open_weights(path).metadata == {"n": "1.5"}
    write_archive(path, pickled=b"}X\1\0\0\0n" + numpy_number("x", bytes(8)) + b"s.")
    assert "numpy dtype of an unknown state" in refused(path)
    write_archive(path, pickled=b"}X\1\0\0\0n" + numpy_number("<", bytes(7)) + b"s.")
    assert "number of numpy with 7 bytes, not 8" in refused(path)


def numpy_number(order, data):
    dtype = b"cnumpy\ndtype\nX\2\0\0\0f8\x85R(K\3X\1\0\0\0" + order.encode() + b"tb"
    return b"cnumpy.core.multiarray\nscalar\n" + dtype + b"C" + bytes([len(data)]) + data + b"\x86R"


def write_archive(path, pickled=b"}.", entries=None, root="archive", **options):
    """Write an archive as torch.save does, of any pickle and entries."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in ({"data.pkl": pickled} | (entries or {})).items():
            archive.writestr(f"{root}/{name}", content)
    return path


def refused(path):
    with pytest.raises(ModelError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    return message


def test_names_are_checked(tmp_path):
    path = tmp_path / "a.pt"
    tensor = torch.ones(1)
    torch.save({"a": {"b": tensor}, "a.b": tensor}, path)
    assert "'a.b' is there twice" in refused(path)
    torch.save({1: tensor, "1": tensor}, path)
    assert "'1' twice in a dictionary" in refused(path)
    torch.save({(1, 2): tensor}, path)
    assert "a key that is a tuple" in refused(path)
    torch.save({"": tensor, "b": tensor, None: tensor, 1.5: tensor}, path)
    assert list(open_weights(path)) == ["", "b", "None", "1.5"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(1), "type StoredTensor, and a dictionary"),
        ([torch.ones(1)], "of type list, and a dictionary"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "holds values of torch.ComplexFloatStorage"),
        ({"a": torch.zeros(1, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, "torch.float8_e8m0"),
        ({"a": torch.empty(2, dtype=torch.float4_e2m1fn_x2)}, "holds values of torch.float4_e2m1"),
        ({"a": torch.ones(1, dtype=torch.complex64).conj().imag}, "conjugated or negated"),
        ({"a": torch.ones(2).to_sparse()}, "names torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.ones(1, device="meta")}, "names torch._utils._rebuild_meta_tensor_no_storage"),
        ({"a": collections.Counter()}, "names collections.Counter"),
        ({"a": torch.nn.Linear(1, 1)}, "names torch.nn.modules.linear.Linear"),
        ({"a": 2**300}, "a number of more than 256 bits"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, value, expected):
    path = tmp_path / "a.pt"
    torch.save(value, path)
    assert expected in refused(path)


def test_other_formats_of_torch_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    assert "is a TorchScript program" in refused(path)


def test_a_zip_archive_that_is_none_of_torchs_is_refused(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("unet/config.json", "{}")
    assert "holds 0 entries data.pkl" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", "}.")
        archive.writestr("b/data.pkl", "}.")
    assert "holds 2 entries data.pkl" in refused(path)
    zipfile.ZipFile(path, "w").close()
    assert "holds 0 entries data.pkl" in refused(path)
    write_archive(path, entries={"byteorder": "big"})
    assert "was written big-endian" in refused(path)
    write_archive(path, entries={"byteorder": "little"})
    assert not open_weights(path)
    write_archive(path, b" " * (2**25 + 1))
    assert "its pickle has 33554433 bytes" in refused(path)


def test_an_archive_may_have_a_comment_and_another_root(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    write_archive(path, entries=entries, root="ネコ")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand"
    agrees(open_weights(path), "a", torch.ones(2))


def test_large_archives_keep_their_places_in_64_bits(tmp_path):
    """What torch writes beyond 4 GiB, by hand: all three places in the extra field."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(large_archive())
    assert open_weights(path).metadata == {"a": "1"}
    for at in range(len(large_archive())):
        path.write_bytes(large_archive()[:at])
        assert refused(path)


def large_archive():
    pickled, name, full = b"}X\1\0\0\0aK\1s.", b"x/data.pkl", 0xFFFFFFFF
    size = len(pickled)
    extra = struct.pack("<2H3Q", 1, 24, size, size, 0)
    content = b"PK\3\4" + struct.pack("<5H3L2H", 45, 0, 0, 0, 0, 0, full, full, len(name), 28)
    content += name + struct.pack("<2H2QQ", 1, 24, size, size, 0) + pickled
    directory = len(content)
    extra = struct.pack("<2HL", 9, 4, 0) + extra  # another field comes first
    content += b"PK\1\2" + struct.pack("<6H3L", 45, 45, 0, 0, 0, 0, 0, full, full)
    content += struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, 0, full) + name + extra
    end = len(content)
    content += b"PK\6\6" + struct.pack(
        "<Q2H2L4Q", 44, 45, 45, 0, 0, 1, 1, end - directory, directory
    )
    content += b"PK\6\7" + struct.pack("<LQL", 0, end, 1)
    return content + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, full, full, 0)


def test_opening_reads_no_tensor(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(2**23, dtype=torch.bfloat16)}, path)
    tracemalloc.start()
    weights = open_weights(path)
    assert "a" in weights
    assert weights.tensors["a"].nbytes == 2**24
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18
    assert repr(weights) == f"Weights({path}: 1 tensors)"
    assert weights.content_hash() == hashlib.sha256(path.read_bytes()).hexdigest()
