import os
import time

import pytest

from engine.errors import RequestError
from engine.store.cache import Cache
from engine.store.eviction import (
    cache_limit,
    discard,
    entries,
    evict,
    facts_path,
    parse_size,
    remove_locks,
    sweep,
)
from engine.store.file_lock import hold, locked, release

SIZE = 1000


def add(folder, name, used):
    """Make an entry of SIZE bytes that was used at a time in seconds."""
    key = Cache.key(name=name)
    path = Cache(folder).put(key, lambda file: file.write_bytes(name.encode() * SIZE), ".engine")
    facts_path(folder, key).write_text("{}")
    os.utime(path, (used, used))
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("500mb", 500 * 10**6),
        (" 7 K ", 7000),
        ("123", 123),
        ("0", 0),
        ("none", None),
        ("None", None),
    ],
)
def test_sizes(text, size, monkeypatch):
    assert parse_size(text) == size
    monkeypatch.setenv("LATENTRT_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "1 PB", "GB", "1iB", "1,5 GB", "٣GB", "1e3"])
def test_what_is_no_size_is_refused(text, monkeypatch):
    with pytest.raises(RequestError, match="is no size; give one such as 20GB"):
        parse_size(text)
    monkeypatch.setenv("LATENTRT_CACHE_LIMIT", text)
    with pytest.raises(RequestError, match="LATENTRT_CACHE_LIMIT: "):
        cache_limit()


def test_the_limit_without_the_variable(monkeypatch):
    for text in (None, ""):
        monkeypatch.delenv("LATENTRT_CACHE_LIMIT", raising=False)
        if text is not None:
            monkeypatch.setenv("LATENTRT_CACHE_LIMIT", text)
        assert cache_limit() == 20 * 10**9


def test_what_was_used_longest_ago_goes_first(folder):
    middle, last, first = (add(folder, name, used) for name, used in (("a", 2), ("b", 3), ("c", 1)))
    assert [entry.path for entry in entries(folder)] == [first, middle, last]
    assert evict(folder, None) == evict(folder, 3 * SIZE) == []
    assert evict(folder, 3 * SIZE - 1) == [first]
    assert evict(folder, SIZE) == [middle]
    assert evict(folder, 0) == [last]
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".lock")] == []


def test_what_is_held_stays_whatever_the_limit(folder):
    old, new = add(folder, "a", 1), add(folder, "b", 2)
    assert hold(old)
    try:
        assert evict(folder, 0) == [new]
        assert old.exists()
        assert facts_path(folder, old.name[:64]).exists()
    finally:
        release(old)


def test_what_is_being_made_stays(folder):
    path = add(folder, "a", 1)
    (entry,) = entries(folder)
    half = folder / f".{entry.key}.0123abcd.engine"
    half.write_bytes(b"half")
    with locked(Cache(folder).lock_path(entry.key)):
        assert not discard(entry)
        assert evict(folder, 0) == []
        assert path.exists()
        assert half.exists()
    assert evict(folder, 0) == [half, path]


def test_what_is_left_over_goes(folder):
    path = add(folder, "a", 1)
    orphan = facts_path(folder, "0" * 64)
    orphan.write_text("{}")
    half = folder / f".{'1' * 64}.0123abcd.engine"
    stale, fresh, other = folder / ".stale.tmp", folder / ".fresh.tmp", folder / "notes.txt"
    for file in (half, stale, fresh, other):
        file.write_bytes(b"half")
    os.utime(stale, (time.time() - 7200,) * 2)
    assert set(sweep(folder)) == {orphan, half, stale}
    assert set(folder.glob("[!.]*")) == {path, facts_path(folder, path.name[:64]), other}
    assert fresh.exists()
    remove_locks(folder)
    assert not list(folder.glob(".lock-*"))


def test_facts_stay_when_their_entry_comes_meanwhile(folder, monkeypatch):
    orphan = facts_path(folder, Cache.key(name="a"))
    folder.mkdir()
    orphan.write_text("{}")
    told = []

    def left_over(path):
        if path != orphan:
            return None
        told.append(path)
        if len(told) == 1:
            return Cache.key(name="a")
        return None

    monkeypatch.setattr("engine.store.eviction._left_over", left_over)
    assert sweep(folder) == []
    assert len(told) == 2
    assert orphan.exists()
