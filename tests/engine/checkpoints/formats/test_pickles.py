import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.formats.pickles import read_pickle
from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError
from tests.support.bad_pickles import number, text

PATH = Path("model.ckpt")


def read(pickled):
    return read_pickle(PATH, pickled, {}, lambda key: ("loaded", key))


PLAIN = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.text() | st.floats(-1, 1)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(VALUES, st.sampled_from(range(6)))
def test_plain_values_are_pythons(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


def test_values_of_python_2_and_bytes_are_read():
    assert read(b"(S'a'\nI01\nI00\nL5L\nF1.5\nU\1bT\1\0\0\0cl.") == [
        "a",
        True,
        False,
        5,
        1.5,
        "b",
        "c",
    ]
    assert read(pickle.dumps([b"x", b"y" * 300], 4)) == [b"x", b"y" * 300]
    assert read(b"(S'a'\nI1\nd.") == {"a": 1}


def test_sets_are_lists_and_keys_are_texts():
    assert read(pickle.dumps({1}, 4)) == [1]
    assert read(pickle.dumps(frozenset([2]), 4)) == [2]
    keys = {0: 2, None: 3, 1.5: 4, True: 5, "a": 6}
    assert read(pickle.dumps(keys, 2)) == {str(key): value for key, value in keys.items()}


def test_the_stack_and_the_memo_are_pythons():
    for pickled in (
        b"K\1(K\2K\3" + b"1.",
        b"K\1K\x020.",
        b"K\1(0.",
        b"]2ap\x31\n0g1\n.",
        b"K\1)0.",
    ):
        mine, reference = read(pickled), pickle.loads(pickled)
        assert repr(mine) == repr(reference)
    shared = read(b"\x80\2]q\0(h\0h\0\x86h\0e.")
    assert shared[0] == (shared, shared)
    assert read(b"\x80\2" + text("a") + b"Q.") == ("loaded", "a")


def test_a_high_index_of_the_memo_takes_no_memory():
    tracemalloc.start()
    assert read(b"\x80\2K\1r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**16


def test_keys_that_collide_cost_no_time():
    """Numbers whose hashes are equal would make a dictionary of Python quadratic."""
    step = 2**61 - 1
    pairs = b"".join(number(i * step) + b"N" for i in range(20_000))
    assert len(read(b"\x80\2}(" + pairs + b"u.")) == 20_000


@pytest.mark.parametrize(
    "pickled", [b"", b".", b"}", b"(.", b"1.", b"0.", b"2.", b"\x94.", b"a.", b"q\0."]
)
def test_a_broken_pickle_is_refused(pickled):
    with pytest.raises(ModelError, match=r"^model\.ckpt is damaged: its pickle .* at byte \d"):
        read(pickled)


def test_values_are_shown_in_messages_however_deep_or_long():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert short(deep) == "a list"
    assert short(10**5000) == "a int"
    assert len(short("x" * 10**6)) == 80
