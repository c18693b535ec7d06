import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.backends.tensorrt.engine_store import EngineFacts, EngineStore, weights_hash
from engine.errors import BackendError, OutputError
from engine.store.eviction import evict, facts_path

ROOT = Path(__file__).parents[4]
PROFILE = {"height": [512, 512, 1024], "width": [512, 512, 512]}
FACTS = EngineFacts(
    library="tensorrt_rtx",
    version="1.7.1",
    part="step",
    architecture="297b066468d7",
    graph="ab" * 32,
    weights="cd" * 32,
    precision="float16",
    profiles=(PROFILE,),
    sm="sm89",
)
OTHERS = {
    "library": "tensorrt",
    "version": "1.7.2",
    "part": "step_shallow",
    "architecture": "a74b45039a33",
    "graph": "ac" * 32,
    "weights": None,
    "precision": "float32",
    "profiles": (PROFILE, PROFILE),
    "sm": "sm120",
    "device": "NVIDIA GeForce RTX 4090",
    "driver": "580.65.06",
    "refit": True,
    "optimization_level": 3,
    "workspace_bytes": 2**30,
}
PIECE = 2**16
ENGINE_BYTES = 40 * PIECE  # 2.6 MB
ENGINES = 5
LIMIT = 3 * ENGINE_BYTES
ROUNDS = 50

# Asks for the engines of FACTS with the versions 0, 1, ... in turn, under a limit that two of five
# pass, so that building, finding and evicting go on all the time; the log counts what is built.
CHILD = f"""
import dataclasses, itertools, json, os, sys, time
from pathlib import Path
from engine.backends.tensorrt.engine_store import EngineFacts, EngineStore

folder, log, versions, pause = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
base, limit = EngineFacts(**json.loads(sys.argv[5])), int(sys.argv[6])

def content(version):
    return bytes([version]) * {ENGINE_BYTES}

def build(version):
    def write(path):
        with open(log, "a") as file:
            file.write(f"{{version}}\\n")
        with path.open("wb") as file:
            whole = content(version)
            for start in range(0, len(whole), {PIECE}):
                file.write(whole[start : start + {PIECE}])
                time.sleep(pause)
    return write

def ask():
    store = EngineStore(folder, limit)
    print("ready", flush=True)
    for version in [int(v) for v in versions.split(",")] if versions else itertools.count():
        version %= {ENGINES}
        facts = dataclasses.replace(base, version=str(version))
        path = store.get_or_build(facts, build(version))
        time.sleep(20 * pause)  # while others evict
        assert path.read_bytes() == content(version)
        store.release(path)
"""
# Forks such a process for a line and kills it with the next, or at the end of the lines: Python and
# its modules are there at once, and the store is opened anew.
FORK_SERVER = f"""
{CHILD}
for _ in sys.stdin:
    if not (child := os.fork()):
        ask()
    sys.stdin.readline()
    os.kill(child, 9)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def facts(version):
    return dataclasses.replace(FACTS, version=str(version))


def content(version):
    return bytes([version]) * ENGINE_BYTES


def writer(data):
    return lambda path: path.write_bytes(data)


def refuse(path):
    raise AssertionError(f"{path} is built again")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines"


@pytest.fixture
def store(folder):
    store = EngineStore(folder, None)
    yield store
    for _, path in store.find():
        store.release(path)


@pytest.fixture
def process(folder, tmp_path):
    """Return what starts Python with the arguments of CHILD."""

    def process(code, versions="", pause=0.0, limit=LIMIT):
        told = (versions, str(pause), json.dumps(dataclasses.asdict(FACTS)), str(limit))
        return subprocess.Popen(
            [sys.executable, "-c", code, folder, tmp_path / "log", *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    return process


@pytest.fixture
def start(process):
    """Start a process that asks for some versions; wait until it begins."""
    children = []

    def start(versions, **options):
        child = process(f"{CHILD}ask()", versions, **options)
        children.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


# Facts


def test_every_fact_changes_the_key():
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(EngineFacts)}
    keys = {dataclasses.replace(FACTS, **{name: value}).key() for name, value in OTHERS.items()}
    assert len({FACTS.key(), *keys}) == 1 + len(OTHERS)


def test_profiles_are_the_same_as_lists_or_tuples():
    same = dataclasses.replace(FACTS, profiles=[{"width": (512, 512, 512), **PROFILE}])
    assert same == FACTS
    assert same.key() == FACTS.key()
    for wrong in ({1, 2}, [float("nan")], [Path("a")]):
        with pytest.raises((TypeError, ValueError)):
            dataclasses.replace(FACTS, profiles=wrong)


def test_weights_are_told_by_names_dtypes_shapes_and_numbers():
    numbers = np.arange(6, dtype=np.float16)
    hashes = [
        weights_hash(weights)
        for weights in (
            {},
            {"a": numbers},
            {"b": numbers},
            {"a": numbers, "b": numbers},
            {"a": numbers.reshape(2, 3)},
            {"a": numbers.view(np.int16)},
            {"a": numbers[::-1]},
            {"a": numbers.reshape(2, 3).T},
            {"a": numbers[:0]},
            {"a": numbers[0]},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert weights_hash({"b": numbers, "a": numbers}) == hashes[3]
    assert weights_hash({"a": np.ascontiguousarray(numbers[::-1])}) == hashes[6]


# Engines


def test_an_engine_is_built_once_and_says_what_it_is(store, folder):
    assert store.get(FACTS) is None
    path = store.get_or_build(FACTS, writer(b"engine"))
    assert path.read_bytes() == b"engine"
    assert path.suffix == ".engine"
    assert store.get(FACTS) == store.get_or_build(FACTS, refuse) == path
    assert json.loads(facts_path(folder, FACTS.key()).read_text())["sm"] == "sm89"
    assert store.find() == [(FACTS, path)]


def test_a_damaged_engine_is_built_again(store):
    path = store.get_or_build(FACTS, writer(b"engine"))
    path.write_bytes(b"Engine")
    assert store.get(FACTS) is None
    assert store.get_or_build(FACTS, writer(b"engine")).read_bytes() == b"engine"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        "\xff",
        "[" * 10**5,
        json.dumps({**dataclasses.asdict(FACTS), "sm": "sm86"}),
        json.dumps({**dataclasses.asdict(FACTS), "more": 1}),
        json.dumps({**dataclasses.asdict(FACTS), "profiles": 5}),
    ],
)
def test_without_its_own_facts_an_engine_is_not_found_by_them(store, folder, text):
    path = store.get_or_build(FACTS, writer(b"engine"))
    beside = facts_path(folder, FACTS.key())
    if text is None:
        beside.unlink()
    else:
        beside.write_text(text, encoding="latin-1")
    assert store.find() == []
    assert store.get_or_build(FACTS, refuse) == path, "which writes its facts again"
    assert store.find() == [(FACTS, path)]


def test_engines_are_found_by_some_facts_the_last_used_first(store):
    wide = dataclasses.replace(FACTS, profiles=({**PROFILE, "width": [512, 512, 1024]},))
    foreign = dataclasses.replace(FACTS, sm="sm120")
    paths = [store.get_or_build(each, writer(b"engine")) for each in (FACTS, wide, foreign)]
    for seconds, path in enumerate(paths):
        os.utime(path, (seconds, seconds))
    assert [found for found, _ in store.find()] == [foreign, wide, FACTS]
    assert store.find(sm="sm89", part="step") == [(wide, paths[1]), (FACTS, paths[0])]
    assert store.find(weights=None) == []
    with pytest.raises(TypeError, match="no facts of an engine: colour"):
        store.find(colour="red")
    store.get(FACTS)
    assert store.find()[0] == (FACTS, paths[0])


def test_a_build_that_fails_leaves_nothing(store, folder):
    def fail(path):
        path.write_bytes(b"half")
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        store.get_or_build(FACTS, fail)
    assert [path for path in folder.iterdir() if not path.name.startswith(".lock")] == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = EngineStore(tmp_path / "file" / "engines", None)
    assert store.get(FACTS) is None
    assert store.find() == []
    with pytest.raises(OutputError, match="set LATENTRT_CACHE"):
        store.get_or_build(FACTS, refuse)


def test_the_folder_and_the_limit_are_those_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    monkeypatch.setenv("LATENTRT_CACHE_LIMIT", "1GB")
    assert EngineStore() == EngineStore(tmp_path / "engines", 10**9)


# The limit


def test_engines_used_longest_ago_make_room(folder):
    store = EngineStore(folder, 250)
    paths = []
    for version in range(4):
        paths.append(store.get_or_build(facts(version), writer(b"x" * 100)))
        os.utime(paths[-1], (version, version))
        store.release(paths[-1])
        if version == 1:
            store.get(facts(0))  # now 1 is the one that was used longest ago
            store.release(paths[0])
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert {found for _, found in store.find()} == {paths[0], paths[3]}


def test_an_engine_above_the_limit_is_kept_until_it_is_released(folder):
    store = EngineStore(folder, 50)
    path = store.get_or_build(FACTS, writer(b"x" * 100))
    assert path.exists()
    store.get_or_build(facts(1), writer(b"x" * 100))
    assert path.exists(), "it may be in use"
    store.release(path)
    last = store.get_or_build(facts(2), writer(b"x" * 100))
    assert not path.exists()
    store.release(last)


# Several processes


def test_two_processes_build_once(start, store, tmp_path):
    children = [start("3", pause=0.01) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert (tmp_path / "log").read_text() == "3\n"
    assert store.get(facts(3)).read_bytes() == content(3)


def test_processes_that_evict_each_other_serve_whole_engines(start, store, folder):
    """Each reads every engine that it got, and ends with an error if one is not as it was."""
    orders = ("0,1,2,3,4,0,1,2", "4,3,2,1,0,4,3,2", "2,4,1,3,0,2,4,1")
    children = [start(order, pause=0.001, limit=ENGINE_BYTES) for order in orders]
    assert [child.wait() for child in children] == [0, 0, 0]
    check(store)
    evict(folder, ENGINE_BYTES)
    assert sum(path.stat().st_size for _, path in store.find()) == ENGINE_BYTES


def check(store):
    """Every engine that is found is whole and the right one."""
    for found, path in store.find():
        assert path.read_bytes() == content(int(found.version))
    for version in range(ENGINES):
        path = store.get(facts(version))
        assert path is None or path.read_bytes() == content(version)
        if path:
            store.release(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killing_at_any_of_many_moments_leaves_a_store_that_works(process, store, folder):
    """A process that builds, finds and evicts is killed; the next goes on in the same folder."""
    moments = random.Random(0)
    served = 0
    with process(FORK_SERVER, pause=0.001) as server:
        for _ in range(ROUNDS):
            print(file=server.stdin, flush=True)
            assert server.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.25))
            print(file=server.stdin, flush=True)
            assert server.stdout.readline() == "-9\n"
            check(store)
            version = moments.randrange(ENGINES)
            served += store.get(facts(version)) is not None
            path = EngineStore(folder, LIMIT).get_or_build(facts(version), writer(content(version)))
            assert path.read_bytes() == content(version)
            store.release(path)
            evict(folder, LIMIT)
            names = [p.name for p in folder.iterdir() if not p.name.startswith(".lock-")]
            assert not [name for name in names if name.startswith(".") and name[-4:] != ".tmp"]
            assert sum(path.stat().st_size for _, path in store.find()) <= LIMIT
    assert 0 < served < ROUNDS, "or nothing was built, or nothing evicted"
