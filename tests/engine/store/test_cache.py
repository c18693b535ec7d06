import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import LatentrtError, ModelError, OutputError
from engine.graphs.graph import graph_folders
from engine.shipped import GRAPHS
from engine.store.cache import Cache, cache_folder, is_readable_folder, write_atomically

ROOT = Path(__file__).parents[3]
KEY = Cache.key(graph="step", precision="float16")
CHUNK = bytes(range(256)) * 64
CHUNKS = 40
CONTENT = CHUNK * CHUNKS
SECONDS = 0.4  # that the child takes to write it

# Puts CONTENT, slowly, and says on the way what it does; waits in the middle for the file HOLD.
# KILL names the call that ends it.
CHILD = f"""
import os, signal, sys, time
from pathlib import Path
from engine.store.cache import Cache

hold = os.environ.get("HOLD")

def write(path):
    print("writing", flush=True)
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    with path.open("wb") as file:
        for _ in range({CHUNKS}):
            file.write({CHUNK!r})
            file.flush()
            time.sleep({SECONDS / CHUNKS})
        while hold and not Path(hold).exists():
            time.sleep(0.01)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

before = {{"fsync": (os, "fsync"), "rename": (Path, "replace"), "cleaning": (Path, "unlink")}}
if kill := os.environ.get("KILL"):
    setattr(*before[kill], die)
print("waiting", flush=True)
print(Cache(Path(sys.argv[1])).put({KEY!r}, write, ".bin"), flush=True)
"""


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def start(cache, tmp_path):
    """Start a process that puts CONTENT, and wait until it says a word."""
    children = []

    def start(until, kill="", hold=""):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, cache.folder, tmp_path / "log"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "KILL": kill, "HOLD": str(hold)},
        )
        children.append(child)
        while until not in (line := child.stdout.readline()):
            assert line, "the child ended"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def writer(content, calls=None):
    def write(path):
        if calls is not None:
            calls.append(path)
        path.write_bytes(content)

    return write


def refuse(path):
    raise AssertionError(f"{path} is built again")


def files(cache):
    """What is in the cache, but for locks."""
    return sorted(p.name for p in cache.folder.iterdir() if not p.name.startswith(".lock-"))


def check_works_again(cache):
    found = cache.get(KEY)
    assert found is None or found.read_bytes() == CONTENT
    entry = cache.put(KEY, writer(CONTENT), ".bin")
    assert entry.read_bytes() == CONTENT
    assert cache.get(KEY) == entry
    assert files(cache) == [entry.name]


# Where the cache is


def test_the_variable_names_the_folder_and_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert Cache(cache_folder()).get(KEY) is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LATENTRT_CACHE", "~/chosen")
    assert cache_folder() == Path.home() / "chosen"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/latentrt"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/latentrt"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/latentrt"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "home/Library/Caches/latentrt"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/latentrt"),
        ("win32", {}, "home/AppData/Local/latentrt"),
    ],
)
def test_each_system_has_its_place(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("LATENTRT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / expected


def test_no_home_is_an_error_that_names_the_variable(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LATENTRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(OutputError, match="set LATENTRT_CACHE"):
        cache_folder()


# Keys


def test_a_home_that_is_closed_to_us_is_an_error_and_what_ships_is_found(monkeypatch, tmp_path):
    stat = os.stat

    def closed(path, *arguments, **options):
        if isinstance(path, str) and path.startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    assert graph_folders()[0] == tmp_path / "cache" / "graphs"
    monkeypatch.setattr(os, "stat", closed)  # root may everything
    with pytest.raises(
        OutputError, match=r"cannot be used \(Permission denied\); set LATENTRT_CACHE"
    ):
        cache_folder()
    assert graph_folders() == (GRAPHS,)


def test_a_folder_that_may_not_be_read_is_none(monkeypatch, tmp_path):
    assert is_readable_folder(tmp_path)
    assert not is_readable_folder(tmp_path / "missing")
    assert not is_readable_folder(tmp_path / ("x" * 5000))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not is_readable_folder(tmp_path)


def test_a_key_is_made_of_all_facts_in_any_order():
    facts = {"graph": "a", "profile": {"height": [512, 1024], "width": 512}, "device": None}
    key = Cache.key(**facts)
    assert key == Cache.key(**dict(reversed(facts.items())))
    assert len(key) == 64
    others = [
        Cache.key(),
        Cache.key(**facts, driver="1"),
        *(Cache.key(**{**facts, name: "b"}) for name in facts),
        Cache.key(**{**facts, "profile": {"height": [1024, 512], "width": 512}}),
        *(Cache.key(device=value) for value in (1, 1.0, True, "1", None, [], {}, [1], "é")),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_key_is_the_hash_of_canonical_json():
    expected = hashlib.sha256(b'{"graph":"step","steps":4}').hexdigest()
    assert Cache.key(steps=4, graph="step") == expected


@pytest.mark.parametrize("fact", [Path("a"), float("nan"), {1, 2}, b"a", object()])
def test_a_key_of_other_things_than_json_is_refused(fact):
    with pytest.raises((TypeError, ValueError)):
        Cache.key(fact=fact)


# Entries


def test_an_entry_is_made_once(cache):
    calls = []
    assert cache.get(KEY) is None
    entry = cache.put(KEY, writer(b"engine", calls), ".engine")
    assert entry.parent == cache.folder
    assert entry.suffix == ".engine"
    assert entry.read_bytes() == b"engine"
    assert calls[0].suffix == ".engine"
    assert cache.get(KEY) == entry
    assert cache.put(KEY, refuse) == entry
    assert cache.get_or_build(KEY, refuse) == entry
    assert Cache(cache.folder).get(KEY) == entry
    assert files(cache) == [entry.name]
    other = cache.get_or_build(Cache.key(graph="vae_decoder"), writer(b"other", calls))
    assert other.read_bytes() == b"other"
    assert cache.get(KEY) == entry
    assert len(calls) == 2


@pytest.mark.parametrize("content", [b"", b"engin", b"engine!", b"Engine"])
def test_a_damaged_entry_is_removed_and_made_again(cache, content):
    entry = cache.put(KEY, writer(b"engine"), ".engine")
    entry.write_bytes(content)
    assert cache.get(KEY) is None
    assert files(cache) == []
    entry = cache.put(KEY, writer(b"engine"), ".engine")
    entry.write_bytes(content)
    assert cache.put(KEY, writer(b"another"), ".engine").read_bytes() == b"another"
    assert len(files(cache)) == 1


def test_an_intact_entry_beside_a_damaged_one_is_found(cache):
    entry = cache.put(KEY, writer(b"engine"))
    for digit in "0f":
        (cache.folder / f"{KEY}.{digit * 64}").write_bytes(b"damaged")
    (cache.folder / f"{KEY}.").write_bytes(b"damaged")
    (cache.folder / f"{KEY}.{'0' * 64}.folder").mkdir()
    assert cache.get(KEY) == entry
    assert cache.put(KEY, refuse) == entry


def test_a_damaged_entry_in_a_folder_for_reading_is_not_returned(cache, monkeypatch):
    entry = cache.put(KEY, writer(b"engine"))
    entry.write_bytes(b"damaged")

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("error", [ModelError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_writer_raises(cache, error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        cache.put(KEY, write)
    assert files(cache) == []
    assert cache.get(KEY) is None
    assert cache.put(KEY, writer(b"engine")).read_bytes() == b"engine"


def test_a_writer_that_writes_nothing_is_an_error(cache):
    with pytest.raises(OutputError, match="No such file"):
        cache.put(KEY, lambda path: None)


def test_a_full_disk_is_an_error_that_says_what_to_do(cache):
    def write(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"cache.*No space left.*or set LATENTRT_CACHE"):
        cache.put(KEY, write)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.get(KEY) is None
    with pytest.raises(OutputError, match=r"file/cache.*set LATENTRT_CACHE"):
        cache.get_or_build(KEY, refuse)


def test_a_folder_without_permission_is_an_error(cache):
    cache.folder.mkdir(mode=0o500)
    if os.access(cache.folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert cache.get(KEY) is None
    with pytest.raises(OutputError, match="Permission denied"):
        cache.put(KEY, refuse)


# Several processes


def test_two_processes_build_once(cache, start, tmp_path):
    go = tmp_path / "go"
    first = start(until="writing", hold=go)
    second = start(until="waiting", hold=go)
    time.sleep(SECONDS / 4)  # for the second to meet the lock
    go.touch()
    outputs = [child.communicate()[0].strip() for child in (first, second)]
    assert outputs == [str(cache.get(KEY))] * 2
    assert cache.get(KEY).read_bytes() == CONTENT
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_one_that_waits_takes_over_when_the_other_is_killed(cache, start, tmp_path):
    go = tmp_path / "go"
    first = start(until="writing", hold=go)
    second = start(until="waiting", hold=go)
    time.sleep(SECONDS / 4)  # for the second to meet the lock
    first.kill()
    go.touch()
    assert second.communicate()[0].split() == ["writing", str(cache.get(KEY))]
    assert (tmp_path / "log").read_text() == "built\n" * 2
    assert files(cache) == [cache.get(KEY).name]


def test_threads_build_once(cache):
    calls = []

    def write(path):
        time.sleep(0.05)
        writer(CONTENT, calls)(path)

    threads = [threading.Thread(target=cache.put, args=(KEY, write)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert cache.get(KEY).read_bytes() == CONTENT


@pytest.mark.parametrize("seed", range(8))
def test_a_process_killed_at_any_moment_leaves_a_cache_that_works(cache, start, seed):
    child = start(until="writing")
    time.sleep(random.Random(seed).uniform(0, SECONDS * 1.2))
    child.kill()
    child.communicate()
    check_works_again(cache)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["fsync", "rename", "cleaning"])
def test_a_process_killed_between_two_calls_leaves_a_cache_that_works(cache, start, moment):
    child = start(until="writing", kill=moment)
    child.communicate()
    assert child.returncode == -9
    assert (cache.get(KEY) is not None) == (moment == "cleaning")
    check_works_again(cache)


# Output files


def neighbours(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_written_whole(tmp_path, old):
    path = tmp_path / "picture.png"
    if old:
        path.write_bytes(old)

    def write(file):
        file.write(b"ne")
        assert (path.read_bytes() if old else None) == old
        file.seek(0)
        file.write(b"new")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert neighbours(path) == ["picture.png"]


def test_a_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_atomically(tmp_path / "picture.png", lambda file: file.write(b"new"))
    assert (tmp_path / "picture.png").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    "error", [ModelError("no"), OutputError("no"), ValueError("no"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_the_old_file_stays_when_the_writer_raises(tmp_path, error, old):
    path = tmp_path / "picture.png"
    if old:
        path.write_bytes(old)

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert neighbours(path) == (["picture.png"] if old else [])
    assert not old or path.read_bytes() == old


def test_the_old_file_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"picture\.png .*No space left.*another path"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert neighbours(path) == ["picture.png"]


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(file)
    for content in (b"new", b"newer"):
        write_atomically(link, lambda out, content=content: out.write(content))
        assert link.is_symlink()
        assert file.read_bytes() == content


@pytest.mark.skipif(sys.platform == "win32", reason="devices have other names on Windows")
def test_a_device_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OutputError, match="a device, a pipe"):
            write_atomically(path, refuse)
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing/picture.png", "missing is not a folder; make it"),
        ("file/picture.png", "file is not a folder; make it"),
        ("folder", "is a folder; give the name of a file"),
        ("", "is a folder; give the name of a file"),
        ("zero\0byte", "is no path"),
        ("loop", "loop"),
        ("n" * 5000, "cannot be written"),
    ],
)
def test_a_path_where_no_file_can_be_is_refused(tmp_path, name, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = neighbours(tmp_path / "file")
    with pytest.raises(OutputError, match=expected) as caught:
        write_atomically(tmp_path / name, refuse)
    assert isinstance(caught.value, LatentrtError)
    assert neighbours(tmp_path / "file") == before


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OutputError, match=r"picture\.png .*Permission denied"):
        write_atomically(tmp_path / "picture.png", refuse)
