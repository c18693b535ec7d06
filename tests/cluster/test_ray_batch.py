"""`latentrt batch --ray`: two actors draw what one process does, and a run goes on."""

import json
import threading
from pathlib import Path

import pytest
import ray  # noqa: F401 - tells that this file needs it

from runtime.batch.__main__ import main
from tests.support.ray_processes import titled

pytestmark = pytest.mark.filterwarnings("default")  # of Ray's own code
SMALL = ("--height", "32", "--width", "32", "--steps", "2", "--backend", "cpu", "--threads", "1")


def records(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def hashes(out):
    found = [(record["file"], record["hash"]) for record in records(out) if not record["error"]]
    assert len(dict(found)) == len(found), "once each"
    assert {path.name for path in out.glob("*.png")} == dict(found).keys()
    return dict(found)


@pytest.fixture
def drawn(cluster, tmp_path, capsys):
    lines = [
        {"prompt": f"a {name}", "sampler": sampler, "num_images_per_prompt": count}
        for name in ("cat", "dog", "hat", "car", "cup")
        for sampler, count in (("ddim", 1), ("euler_a", 2), ("dpmpp_2m", 1), ("euler", 1))
    ]
    texts = [json.dumps(line) for line in lines]
    texts[3:3] = ["no JSON", json.dumps({"prompt": "a tall one", "height": 33})]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(texts) + "\n")

    def draw(out, *options):
        return main([str(file), "--out", str(out), "--seed", "7", *SMALL, *options])

    return draw


def test_two_actors_draw_what_one_process_does(drawn, tmp_path, capsys):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert drawn(alone) == 1
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.05):
            seen.update(titled("MapWorker"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert drawn(spread, "--ray", "--actors", "2") == 1
    finally:
        over.set()
        looking.join()
    assert len(seen) == 2
    assert hashes(spread) == hashes(alone)
    assert len(hashes(spread)) == 25
    bad = {record["line"]: record["error"] for record in records(spread) if record["error"]}
    assert bad == {r["line"]: r["error"] for r in records(alone) if r["error"]}
    assert bad.keys() == {4, 5}
    before = hashes(spread)
    for name in ("000001.png", "000002-2.png"):
        (spread / name).unlink()
    capsys.readouterr()
    assert drawn(spread, "--ray", "--actors", "2") == 1
    assert "25 pictures are in" in capsys.readouterr().out
    there = {path.name: path for path in spread.glob("*.png")}
    assert there.keys() == before.keys()


def test_a_model_that_is_not_there_is_one_sentence(drawn, tmp_path, capsys):
    out = Path(tmp_path / "out")
    assert drawn(out, "--ray", "--model", "nothing") == 2
    assert "\nerror: the model 'nothing' is" in capsys.readouterr().err
