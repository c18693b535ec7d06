"""Models of published sizes and random numbers, written tensor by tensor: no copy is in memory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.support.original_layout import Shapes

KINDS = gguf.GGMLQuantizationType
CUT = 256  # numbers of the rows that ComfyUI-GGUF cuts what is no matrix into
# Bytes of a block of Q4_K: two float16 factors, 12 of scales and minima, 128 of numbers.
Q4_K_FACTORS, Q4_K_BYTES = 4, 144
# How a factor of 1 spreads what random scales and numbers make, and the minima that centre it.
Q4_K_SPREAD, Q4_K_CENTRE = 258.0, 7.5


def random_numbers(names: Shapes) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield float32 numbers with which activations keep the size they come in."""
    pool = np.random.default_rng(len(names)).standard_normal(2**22).astype(np.float32)
    for name, shape in names.items():
        values = np.resize(pool, shape)
        if len(shape) < 2:
            is_norm = name.endswith("weight")  # no other weight has one axis
            yield name, np.asarray(0.05 * values + (1.0 if is_norm else 0.0), np.float32)
        else:
            yield name, values / np.float32(math.sqrt(math.prod(shape[1:])))


def write_float16(path: Path, names: Shapes) -> Path:
    """Write a safetensors file in float16."""
    header, end = {}, 0
    for name, shape in names.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in random_numbers(names):
            file.write(values.astype(np.float16).tobytes())
    return path


def write_gguf(path: Path, names: Shapes, kind: gguf.GGMLQuantizationType) -> Path:
    """Write a GGUF file whose weights are in Q8_0 or Q4_K, as far as their sizes allow.

    Matrices of whole blocks keep their rows, other weights of whole blocks are cut into rows of
    256 with their shapes beside them, as ComfyUI-GGUF does; what is left stays float16, and
    float32 where it has one axis.
    """
    writer = gguf.GGUFWriter(path, "sd1")
    for name, shape in names.items():
        rows, columns = _rows(shape, kind)
        if not columns:
            dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
            stored, count = shape or (1,), math.prod(shape)
            writer.add_tensor_info(name, stored, dtype, count * dtype.itemsize)
            continue
        if (rows, columns) != shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
        values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        stored = (rows, columns // values * nbytes)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, array in random_numbers(names):
        writer.write_tensor_data(_stored(array, kind))
    writer.close()
    return path


def _rows(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[int, int]:
    """Return the rows and columns in which a weight is cut into blocks, (0, 0) if it is not."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if len(shape) == 2 and shape[1] % block == 0:
        return shape[0], shape[1]
    count = math.prod(shape)
    return (count // CUT, CUT) if len(shape) > 1 and count % CUT == 0 else (0, 0)


def _stored(array: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    rows, columns = _rows(array.shape, kind)
    if not columns:
        return array.astype(np.float16) if array.ndim > 1 else array
    cut = array.reshape(rows, columns)
    return gguf.quants.quantize(cut, kind) if kind == KINDS.Q8_0 else _random_q4_k(cut)


def _random_q4_k(cut: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draw blocks of any scales and numbers that spread as wide: the library packs no Q4_K."""
    rows, columns = cut.shape
    blocks = rows * columns // CUT
    pool = np.random.default_rng(blocks).integers(0, 256, 2**22, np.uint8)
    stored = np.resize(pool, (blocks, Q4_K_BYTES))
    factor = float(cut[: 2**10].std()) / Q4_K_SPREAD
    factors = np.array([factor, Q4_K_CENTRE * factor], np.float16)
    stored[:, :Q4_K_FACTORS] = np.frombuffer(factors.tobytes(), np.uint8)
    return stored.reshape(rows, -1)
