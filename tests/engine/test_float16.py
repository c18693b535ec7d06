from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.checkpoints.formats import tensors as float16
from engine.checkpoints.formats.tensors import add_into, widen

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)
QUIET = EVERY[~np.isnan(EVERY)]
FINITE = EVERY[np.isfinite(EVERY)]


def same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("numbers", [QUIET, FINITE])
@pytest.mark.parametrize("piece", [1000, 2**16])
def test_every_number_is_the_one_that_numpy_makes(
    monkeypatch: pytest.MonkeyPatch, numbers: NDArray[Any], piece: int
) -> None:
    monkeypatch.setattr(float16, "PIECE", piece)
    same_bits(widen(numbers), numbers.astype(np.float32))
    total = np.linspace(-3, 3, numbers.size, dtype=np.float32)
    expected = total + numbers
    add_into(total, numbers)
    same_bits(total, expected)


def test_what_is_no_number_stays_none() -> None:
    assert np.array_equal(np.isnan(widen(EVERY)), np.isnan(EVERY))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4)])
def test_any_shape_and_float_type_is_converted(
    dtype: type[Any], order: Any, shape: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    values = np.asarray(values / 3, dtype, order=order)
    values.flags.writeable = False
    wide = widen(values)
    same_bits(wide, values.astype(np.float32))
    assert not np.shares_memory(wide, values)
    add_into(wide, values)
    assert np.allclose(wide, 2 * values.astype(np.float64), rtol=1e-6)
