"""Scratch memory: a file without a name where one can be made, memory where none can."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from engine.errors import OutputError
from engine.graphs.graph import GRAPHS, graph_folders
from engine.store import scratch as module
from engine.store.scratch import Scratch

RNG = np.random.default_rng(3)


def check():
    """Put arrays into a scratch, and find them again after its memory was given back."""
    arrays = [RNG.integers(-128, 128, shape).astype(np.int8) for shape in ((3, 5), (7, 2, 2, 2))]
    scratch = Scratch(sum(array.nbytes for array in arrays))
    there = [scratch.put(array) for array in arrays]
    scratch.release()
    is_file = scratch._is_file
    del scratch
    for array, expected in zip(there, arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
    return is_file


@pytest.fixture
def no_folder(tmp_path, monkeypatch):
    """A cache folder that cannot be made, and no temporary one."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "tmp"))


def test_it_is_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    assert check()
    assert list((tmp_path / "cache").iterdir()) == [], "the file has no name"


def test_without_a_cache_folder_it_is_in_the_temporary_one(tmp_path, no_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert check()


def test_without_any_folder_it_is_memory(no_folder):
    assert not check()


def test_without_a_home_it_is_in_the_temporary_folder(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LATENTRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert check()
    assert graph_folders() == (GRAPHS,), "what ships draws without a home"


def test_no_room_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    with pytest.raises(OutputError, match=r"MiB .* has no room .*set LATENTRT_CACHE"):
        Scratch(2**60)


def test_a_full_folder_is_no_reason_to_fill_the_memory(no_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = []
    monkeypatch.setattr(module.mmap, "mmap", lambda *sizes: mapped.append(sizes))
    with pytest.raises(OutputError, match="has no room"):
        Scratch(2**60)
    assert not mapped
