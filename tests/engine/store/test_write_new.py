"""Files that take a free name beside those that are there."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import OutputError
from engine.store.cache import write_new


def test_a_new_file_takes_the_next_free_name(tmp_path, monkeypatch):
    def write(text):
        return write_new(tmp_path / "a.png", lambda file: file.write(text)).name

    (tmp_path / "a-3.png").mkdir()
    assert [write(b"1"), write(b"2"), write(b"3")] == ["a.png", "a-2.png", "a-4.png"]

    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert [write(b"5"), write(b"6")] == ["a-5.png", "a-6.png"]
    written = sorted(path.read_bytes() for path in tmp_path.glob("*") if path.is_file())
    assert written == [b"1", b"2", b"3", b"5", b"6"]


def test_threads_that_write_one_name_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tasks = [
            pool.submit(write_new, tmp_path / "a.png", lambda file, i=i: file.write(b"%d" % i))
            for i in range(40)
        ]
        paths = [task.result() for task in tasks]
    assert len(set(paths)) == 40
    assert {path.read_bytes() for path in paths} == {b"%d" % i for i in range(40)}
    assert len(list(tmp_path.iterdir())) == 40


def test_a_new_file_that_cannot_be_written_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_new(tmp_path / "a.png", fail)
    assert list(tmp_path.iterdir()) == []
