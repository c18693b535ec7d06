import json
import shutil

import pytest

from engine.backends.tensorrt.engine_store import EngineFacts, EngineStore
from engine.shipped import GRAPHS
from engine.store.eviction import facts_path
from export.__main__ import main

FACTS = EngineFacts(
    library="tensorrt_rtx",
    version="1.7.1",
    part="step",
    architecture="297b066468d7",
    graph="ab" * 32,
    weights=None,
    precision="float16",
    profiles=({"height": [512, 512, 1024], "width": [512, 512, 512]},),
    sm="sm89",
)
OTHER = EngineFacts(
    library="tensorrt",
    version="11.4",
    part="vae_decoder",
    architecture="45590ec9c78c",
    graph="cd" * 32,
    weights="ef" * 32,
    precision="float16",
    profiles=(),
    sm="sm90",
    device="NVIDIA H200",
)
GRAPH = "text_encoder-eaecaf288138-float16.onnx.gz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two engines and a graph, in a cache that the variable names."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    monkeypatch.delenv("LATENTRT_CACHE_LIMIT", raising=False)
    store = EngineStore()
    for facts, size in ((FACTS, 3_000_000), (OTHER, 1_000_000)):
        store.release(
            store.get_or_build(facts, lambda path, size=size: path.write_bytes(b"x" * size))
        )
    (tmp_path / "graphs").mkdir()
    shutil.copy(GRAPHS / GRAPH, tmp_path / "graphs")
    return tmp_path


def told(capsys, *arguments):
    assert main(["cache", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def files(cache):
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def engine(cache, facts):
    (path,) = (cache / "engines").glob(f"{facts.key()}.*")
    return path


def test_a_table_says_what_there_is(cache, capsys):
    before = files(cache)
    assert main(["cache"]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert "1.0 MB" in rows[0]
    assert "vae_decoder float16, tensorrt 11.4, NVIDIA H200" in rows[0]
    assert "step float16, tensorrt_rtx 1.7.1, sm89, height 512:512:1024 width 512" in rows[1]
    assert f"graphs/{GRAPH}" in rows[2]
    assert all("not checked" in row for row in rows)
    assert total.startswith("3 files, 4.0 MB, in ")
    assert total.endswith("engines are limited to 20.0 GB")
    assert files(cache) == before


def test_json_says_the_same(cache, capsys, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE_LIMIT", "none")
    listing = told(capsys)
    assert listing["folder"] == str(cache)
    assert listing["limit"] is None
    assert listing["bytes"] == sum(item["bytes"] for item in listing["items"]) > 4_000_000
    assert [item["what"] for item in listing["items"]][2] == "graph"
    assert listing["items"][1]["facts"]["profiles"] == list(FACTS.profiles)
    assert listing["removed"] == []
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.endswith("engines are without a limit\n")


def damage(cache):
    """Break an engine, the facts of the other, and the graph."""
    engine(cache, FACTS).write_bytes(b"y" * 3_000_000)
    facts_path(cache / "engines", OTHER.key()).write_text("{")
    (cache / "graphs" / GRAPH).write_bytes(b"")


def test_verifying_says_what_is_damaged_and_removes_nothing(cache, capsys):
    assert {item["state"] for item in told(capsys, "--verify")["items"]} == {"whole"}
    damage(cache)
    before = files(cache)
    states = {item["file"]: item["state"] for item in told(capsys, "--verify")["items"]}
    assert states == {
        f"engines/{engine(cache, FACTS).name}": "damaged",
        f"engines/{engine(cache, OTHER).name}": "without readable facts",
        f"graphs/{GRAPH}": "damaged",
    }
    assert files(cache) == before


def test_pruning_removes_what_is_damaged_or_left_over(cache, capsys):
    left = cache / "engines" / f".{'0' * 64}.0123abcd.engine"
    left.write_bytes(b"half")
    engine(cache, FACTS).write_bytes(b"y" * 3_000_000)
    gone, kept = engine(cache, FACTS).name, engine(cache, OTHER).name
    listing = told(capsys, "--prune")
    assert set(listing["removed"]) == {f"engines/{gone}", f"engines/{left.name}"}
    assert [item["state"] for item in listing["items"]] == ["whole", "whole"]
    assert files(cache) == {
        f"engines/{kept}",
        f"engines/facts-{OTHER.key()}.json",
        f"graphs/{GRAPH}",
    }
    (cache / "graphs" / GRAPH).write_bytes(b"")
    facts_path(cache / "engines", OTHER.key()).write_text("{")
    assert main(["cache", "--prune"]) == 0
    out = capsys.readouterr().out
    assert f"removed engines/{kept}\nremoved graphs/{GRAPH}\n" in out
    assert files(cache) == set()


def engine_is_there(cache, facts):
    return bool(list((cache / "engines").glob(f"{facts.key()}.*")))


def test_pruning_to_a_size_removes_what_was_used_longest_ago(cache, capsys):
    gone = engine(cache, FACTS).name
    listing = told(capsys, "--prune", "2MB")
    assert listing["removed"] == [f"engines/{gone}"]
    assert not engine_is_there(cache, FACTS)
    assert engine_is_there(cache, OTHER)
    assert GRAPH in listing["items"][1]["file"], "only engines go"
    assert EngineStore().get(OTHER)
    assert told(capsys, "--prune", "0")["removed"] == [], "it is held"
    EngineStore.release(engine(cache, OTHER))
    assert len(told(capsys, "--prune", "0")["removed"]) == 1


def test_an_empty_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "missing"))
    for arguments in ((), ("--verify",), ("--prune",), ("--prune", "1GB")):
        assert told(capsys, *arguments)["items"] == []
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.startswith("0 files, 0.0 MB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "arguments", "message"),
    [
        ("", ["--prune", "much"], "error: 'much' is no size; give one such as 20GB"),
        ("lots", [], "error: LATENTRT_CACHE_LIMIT: 'lots' is no size"),
    ],
)
def test_a_size_that_is_none_is_one_sentence(
    variable, arguments, message, cache, capsys, monkeypatch
):
    monkeypatch.setenv("LATENTRT_CACHE_LIMIT", variable)
    assert main(["cache", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["cache", "--help"])
    assert caught.value.code == 0
    assert "python -m export cache" in capsys.readouterr().out
