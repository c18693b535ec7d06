import gguf
import numpy as np
import pytest

from engine.checkpoints.formats.blocks import BLOCKS, PIECE, read_blocks
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.formats.gguf import NOT_READ, TYPES
from tests.support.bad_gguf import GOOD

KINDS = gguf.GGMLQuantizationType


def written(path, tensors, **arrays):
    """Write a file with the reference: arrays of numbers, or of bytes with a kind of blocks."""
    writer = gguf.GGUFWriter(None, "sd1")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, values in arrays.items():
        writer.add_array(name, values)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_weights(path)


def blocks(kind, rows=3, columns=2):
    """Draw blocks of any bytes."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 256, (rows, columns * nbytes), np.uint8)


def reference(array, kind):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(array, kind)


def same(ours, expected):
    """Compare all bits, but for those of numbers that are none."""
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(ours)[numbers], np.signbit(expected)[numbers])


def test_types_have_the_references_numbers_and_sizes():
    assert {KINDS[name].value: name for name in TYPES.values()} == dict(TYPES)
    for number, name in NOT_READ.items():
        assert name in ("Q8_1", "Q8_K") or KINDS(number).name == name
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[KINDS[name]] == (block.values, block.nbytes)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_the_references_bit_for_bit(tmp_path, name):
    kind = KINDS[name]
    array = blocks(kind, rows=40, columns=5)
    weights = written(tmp_path / "model.gguf", {"weight": (array, kind)})
    assert weights.tensors["weight"].dtype == name
    assert weights.tensors["weight"].nbytes == array.nbytes
    assert weights.tensors["weight"].is_float
    same(weights["weight"], reference(array, kind))
    assert not weights["weight"].flags.writeable


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_come_out_near_where_they_were(tmp_path, name):
    numbers = np.random.default_rng(1).standard_normal((16, 320)).astype(np.float32)
    array = gguf.quants.quantize(numbers, KINDS[name])
    ours = written(tmp_path / "model.gguf", {"weight": (array, KINDS[name])})["weight"]
    same(ours, reference(array, KINDS[name]))
    assert np.abs(ours - numbers).max() < (0.02 if name == "Q8_0" else 0.5)


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_plain_numbers_are_the_references(tmp_path, name):
    numbers = np.random.default_rng(2).standard_normal((2, 3, 4, 5)).astype(np.float32)
    array = gguf.quants.quantize(numbers, KINDS[name])
    ours = written(tmp_path / "model.gguf", {"weight": (array, KINDS[name])})["weight"]
    assert ours.shape == numbers.shape
    np.testing.assert_array_equal(ours.astype(np.float32), reference(array, KINDS[name]))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int16, np.int32, np.int64])
def test_other_numbers_are_kept(tmp_path, dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    same(written(tmp_path / "model.gguf", {"a": (array, None)})["a"], array)


def test_rows_are_cut_into_blocks_and_given_their_shape_back(tmp_path):
    shape = (320, 4, 3, 3)
    numbers = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    array = gguf.quants.quantize(numbers.reshape(-1, 256), KINDS.Q8_0)
    arrays = {"comfy.gguf.orig_shape.conv_in.weight": shape}
    weights = written(tmp_path / "model.gguf", {"conv_in.weight": (array, KINDS.Q8_0)}, **arrays)
    assert weights.tensors["conv_in.weight"].shape == shape
    same(weights["conv_in.weight"], reference(array, KINDS.Q8_0).reshape(shape))


def test_more_blocks_than_are_read_at_once(tmp_path):
    kind = KINDS.Q4_K
    array = blocks(kind, rows=PIECE // 256 + 3, columns=1)
    same(read_blocks("Q4_K", array.reshape(-1)), reference(array, kind).reshape(-1))


def test_facts_become_texts(tmp_path):
    weights = written(tmp_path / "model.gguf", {"a": (np.zeros(1, np.float32), None)})
    assert weights.metadata == {
        "general.architecture": "sd1",
        "general.quantization_version": str(gguf.GGML_QUANT_VERSION),
    }


def test_a_file_made_by_hand_is_the_references(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    weights = open_weights(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert weights.keys() == tensors.keys()
    np.testing.assert_array_equal(weights["weight"], tensors["weight"].data)
    expected = reference(tensors["blocks"].data, KINDS.Q8_0)
    same(weights["blocks"], expected.reshape(8, 4, 2))


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path, version):
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD[:4] + version.to_bytes(4, "little") + GOOD[8:])
    assert len(open_weights(path)) == 2
