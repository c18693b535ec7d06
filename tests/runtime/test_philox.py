"""Philox and the numbers of torch's CUDA generator, against what was published of real GPUs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from runtime.noise import MAX_SEED, NOISES, PhiloxNoise, TorchNoise, make_noise
from runtime.philox import philox4x32
from tests.support.tolerances import PHILOX_NOISE, PRINTED_NOISE

WORD = st.integers(0, 2**32 - 1)
SEEDS = st.integers(0, MAX_SEED)

# Random123, tests/kat_vectors, the lines "philox4x32 10": counter, key, answer
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1",
]
EDGES = (0, 1, 2, -3, -2, -1)  # the rows and columns that torch prints of a large tensor


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """One counter, with Python's integers, as section 3.3 of the paper has it."""
    left, right = [counter[1], counter[3]], [counter[0], counter[2]]
    for turn in range(10):
        keys = [(key[i] + turn * (0x9E3779B9, 0xBB67AE85)[i]) % 2**32 for i in (0, 1)]
        products = [right[0] * 0xD2511F53, right[1] * 0xCD9E8D57]
        highs, lows = [p // 2**32 for p in products], [p % 2**32 for p in products]
        right = [highs[1] ^ left[0] ^ keys[0], highs[0] ^ left[1] ^ keys[1]]
        left = [lows[1], lows[0]]
    return [right[0], left[0], right[1], left[1]]


def draw_by_hand(seed: int, calls: int, size: int, threads: int) -> list[float]:
    """One draw as the CUDA kernel makes it, thread after thread, element after element."""
    grid = min(-(-size // 256) * 256, threads)
    values = [math.nan] * size
    for thread in range(grid):
        call = calls
        for start in range(thread, size, 4 * grid):
            words = philox_by_hand([call, 0, thread, 0], [seed % 2**32, seed // 2**32])
            for output in range(4):
                if start + output * grid < size:
                    x, y = (float(np.float32(word)) for word in words[output // 2 * 2 :][:2])
                    u = float(np.float32(x * 2.0**-32 + 2.0**-33))
                    turn = float(np.float32(2.0**-32 * 6.2831855))
                    angle = float(np.float32(y * turn + turn / 2))
                    wave = (math.sin, math.cos)[output % 2]
                    values[start + output * grid] = math.sqrt(-2 * math.log(u)) * wave(angle)
            call += 1
    return values


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(line):
    words = [int(word, 16) for word in line.split()]
    counter = tuple(np.uint64(word) for word in words[:4])
    assert list(philox4x32(counter, words[4] | words[5] << 32)) == words[6:]
    assert philox_by_hand(words[:4], words[4:6]) == words[6:]


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), SEEDS)
def test_philox_is_the_papers_for_every_counter(counters, key):
    columns = tuple(np.array(column, np.uint64) for column in zip(*counters, strict=True))
    drawn = np.stack(philox4x32(columns, key), axis=1)
    for counter, words in zip(counters, drawn.tolist(), strict=True):
        assert words == philox_by_hand(list(counter), [key % 2**32, key >> 32])


@pytest.mark.parametrize("threads", [256, 512, None])
@pytest.mark.parametrize("seed", [0, 42, 2**32, 2**63 + 7, MAX_SEED])
def test_consecutive_draws_follow_the_kernel(seed, threads):
    noise, calls = PhiloxNoise(seed, threads), 0
    for size in (1, 5, 300, 1024, 1025, 2500, 0, 2):
        expected = draw_by_hand(seed, calls, size, threads or size)
        drawn = noise.normal((size,))
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=PHILOX_NOISE)
        calls += -(-size // (4 * (threads or max(size, 1))))  # counter_offset / 4


def test_a_stream_goes_on_when_its_lowest_word_is_full():
    noise = PhiloxNoise(9)
    noise._calls = 2**32 + 3  # nobody draws that often in a test
    words = philox_by_hand([3, 1, 0, 0], [9, 0])
    u, angle = (words[0] + 0.5) / 2**32, (words[1] + 0.5) / 2**32 * 2 * math.pi
    expected = math.sqrt(-2 * math.log(u)) * math.sin(angle)
    assert noise.normal((1,))[0] == pytest.approx(expected, abs=PHILOX_NOISE)


# What people printed of `torch.randn` on their GPUs


def test_numbers_of_a_gpu_in_full():
    """Seed 0, 16 numbers: a test of the Rust library zenu that was made with torch on a GPU."""
    printed = [-0.9246624, -0.42534423, -2.6438458, 0.14518386, -0.1208664, -0.57972574]
    printed += [-0.622851, -0.3283869, -1.0745419, -0.36314395, -1.6710504, 2.2655048]
    printed += [0.3116848, -0.1841891, 1.2866427, 1.1819527]
    np.testing.assert_allclose(PhiloxNoise(0).normal((16,)), printed, rtol=0, atol=PHILOX_NOISE)


def test_numbers_of_automatic1111():
    """Seed 0, (3, 4): the docstring of its rng_philox.py, which computes in float64."""
    printed = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(PhiloxNoise(0).normal((3, 4)), printed, rtol=0, atol=PHILOX_NOISE)


def test_six_consecutive_draws_of_a_gpu():
    """Seed 42, six times randn(4): a reproduction of a bug in torch's compiler, printed."""
    printed = [
        [0.1940, 2.1614, -0.1721, 0.8491],
        [0.1391, -0.1082, -0.7174, 0.7566],
        [-0.5187, 1.2268, 0.6255, -0.9117],
        [-0.6974, -1.8688, -0.8832, -1.6627],
        [-1.2682, -0.0383, -0.1029, 1.4400],
        [1.4640, -0.3238, 0.7740, 1.5892],
    ]
    noise = PhiloxNoise(42)
    drawn = [noise.normal((4,)) for _ in printed]
    np.testing.assert_allclose(drawn, printed, rtol=0, atol=PRINTED_NOISE)


def test_a_large_second_draw_of_a_gpu():
    """Seed 42, the second draw, (2752, 64): what the model BAGEL printed of its first noise."""
    printed = [
        [0.1391, -0.1082, -0.7174, 0.9300, 0.0463, 0.3486],
        [1.0300, 0.0132, 0.5492, -0.1305, 1.1959, -0.6755],
        [-0.5086, 0.9697, 0.1405, -0.4820, -1.1465, 1.6159],
        [-0.6324, 0.0808, 1.2231, -0.7115, 0.1219, -0.5428],
        [1.7063, -0.4001, 0.1870, -0.7175, 0.8615, -0.4262],
        [-1.2329, -0.5312, 0.1857, -0.4459, 0.2437, -1.4525],
    ]
    noise = PhiloxNoise(42)
    noise.normal((1, 4, 64, 64))
    drawn = noise.normal((2752, 64))[np.ix_(EDGES, EDGES)]
    np.testing.assert_allclose(drawn, printed, rtol=0, atol=PRINTED_NOISE)


@pytest.mark.parametrize(
    ("threads", "printed"),
    [
        (132 * 2048, (-0.2963, 2.6764, -0.1408, -0.6970, -0.7780, 0.3267)),  # H100
        (108 * 2048, (-0.2963, 2.6764, -0.1408, 0.1549, -0.6797, -0.1656)),  # A100
    ],
)
def test_gpus_that_differ_in_a_draw_of_many_calls(threads, printed):
    """Seed 1, 9,483,264 numbers: pytorch/pytorch#143086."""
    drawn = PhiloxNoise(1, threads).normal((49 * 12 * 112 * 144,))[list(EDGES)]
    np.testing.assert_allclose(drawn, printed, rtol=0, atol=PRINTED_NOISE)


def test_a_gpu_with_fewer_threads_than_numbers():
    """Seed 14, normal_(5, sqrt 5) of (1000, 100) on an RTX A4000: pytorch/pytorch#97097."""
    printed = [
        [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
        [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
        [6.5552, 4.0857, 4.2315, 2.7704, 3.5479, 3.3063],
        [8.6297, 2.3137, 6.2596, 7.9358, 4.4697, 2.7475],
        [7.0551, 7.8583, 3.9990, 4.1139, 8.9315, 4.2042],
        [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604],
    ]
    drawn = PhiloxNoise(14, 48 * 1536).normal((1000, 100))[np.ix_(EDGES, EDGES)]
    np.testing.assert_allclose(drawn * 5**0.5 + 5, printed, rtol=0, atol=PRINTED_NOISE)


def test_threads_matter_only_for_what_exceeds_them():
    few, many = PhiloxNoise(5, 1024), PhiloxNoise(5)
    for size in (1, 1023, 1024):
        np.testing.assert_array_equal(few.normal((size,)), many.normal((size,)))
    assert not np.array_equal(few.normal((1025,)), many.normal((1025,)))


# What any source of noise must do


def test_a_large_sample_is_normal():
    values = PhiloxNoise(2024).normal((1000, 1000))
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 1) < 0.005
    assert abs((values**3).mean()) < 0.02
    assert abs((values**4).mean() - 3) < 0.05
    assert np.isfinite(values).all()


def test_draws_of_one_stream_and_of_neighbouring_seeds_are_independent():
    noise, size = PhiloxNoise(7), 250_000
    draws = [noise.normal((size,)) for _ in range(3)] + [PhiloxNoise(8).normal((size,))]
    correlations = np.corrcoef(draws) - np.eye(4)
    assert abs(correlations).max() < 5 / math.sqrt(size)


@given(SEEDS, st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=4))
def test_one_seed_gives_one_stream(seed, shapes):
    first, second = PhiloxNoise(seed), make_noise("cuda", np.uint64(seed))
    for shape in shapes:
        drawn = first.normal(shape)
        assert (drawn.shape, drawn.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(drawn, second.normal(shape))


def test_all_64_bits_of_a_seed_count():
    drawn = {PhiloxNoise(seed).normal((1,))[0] for seed in (1, 1 + 2**32, 1 + 2**63)}
    assert len(drawn) == 3


def test_both_kinds_can_be_made():
    assert list(NOISES) == ["cpu", "cuda"]
    np.testing.assert_array_equal(make_noise("cpu", 3).normal((20,)), TorchNoise(3).normal((20,)))
    np.testing.assert_array_equal(make_noise("cuda", 3).normal((2,)), PhiloxNoise(3).normal((2,)))


@pytest.mark.parametrize("kind", ["gpu", "", None, "CPU", ["cpu"]])
def test_other_kinds_are_refused(kind):
    with pytest.raises(RequestError, match=r"noise is .*(choose one of|There are) cpu, cuda"):
        make_noise(kind, 0)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "1", None])
def test_other_seeds_are_refused(kind, seed):
    with pytest.raises(RequestError, match="seed is"):
        make_noise(kind, seed)


@pytest.mark.parametrize("threads", [0, -256, 100, 1024.0, "1024", True])
def test_other_threads_are_refused(threads):
    with pytest.raises(RequestError, match=r"threads is .*; give a multiple of 256"):
        PhiloxNoise(0, threads)
