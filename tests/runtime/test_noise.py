import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from runtime.noise import MAX_SEED, TorchNoise
from tests.support.tolerances import TORCH_NOISE

SEEDS = st.integers(0, MAX_SEED)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
SMALL_SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def check_draws(seed: int, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = TorchNoise(seed)
    for shape in shapes:
        expected = torch.randn(shape, generator=generator).numpy()
        drawn = noise.normal(shape)
        assert drawn.dtype == np.float32
        assert drawn.shape == expected.shape
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=TORCH_NOISE)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**63, MAX_SEED])
def test_latents_of_one_picture_are_torchs(seed):
    check_draws(seed, [(1, 4, 64, 64), (1, 4, 64, 64), (2, 4, 33, 17)])


@pytest.mark.parametrize("size", [*range(40), 624, 625, 1000, 4097])
def test_every_size_is_torchs(size):
    check_draws(7, [(size,), (size,), (16,)])


def test_a_spare_number_waits_through_a_large_draw():
    check_draws(3, [(1,), (16,), (1,), (3,), (100,), (2,), (15,), (0,), (1,), ()])


def test_a_large_sample_is_torchs_and_normal():
    check_draws(2024, [(1_000_003,)])
    values = TorchNoise(2024).normal((1_000_000,))
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 1) < 0.005


@given(SEEDS, st.lists(SHAPES, max_size=6))
def test_consecutive_draws_are_torchs(seed, shapes):
    check_draws(seed, shapes)


@given(SEEDS, st.lists(SMALL_SHAPES, max_size=12))
def test_consecutive_small_draws_are_torchs(seed, shapes):
    check_draws(seed, shapes)


@given(SEEDS)
def test_one_seed_gives_one_stream(seed):
    first, second = TorchNoise(seed), TorchNoise(np.uint64(seed))
    for shape in [(5,), (4, 8, 8)]:
        np.testing.assert_array_equal(first.normal(shape), second.normal(shape))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "1", None])
def test_other_seeds_are_refused(seed):
    with pytest.raises(RequestError, match="seed is"):
        TorchNoise(seed)
