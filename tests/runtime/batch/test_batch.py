"""`latentrt batch`: pictures as they are alone, kills, repairs, and what is passed over."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import BackendError, OutputError
from runtime import Pipeline, adapted_model
from runtime.batch import drawing, store
from runtime.batch.__main__ import main
from runtime.batch.manifest import Manifest, opened_folder
from runtime.images.files import read_settings
from tests.support.named_requests import write_lora

ROOT = Path(__file__).parents[3]
SMALL = ("--height", "32", "--width", "32", "--steps", "2", "--backend", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*lines, name="requests.jsonl"):
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def draw(file, *options, out="out"):
    return main([file, "--out", out, *SMALL, *options])


def records(out="out"):
    return [json.loads(line) for line in (Path(out) / "manifest.jsonl").read_text().splitlines()]


def hashes(out="out"):
    """Return what the manifest says of each picture, which the files must bear out."""
    found = {}
    for record in records(out):
        if record["error"] is None:
            data = (Path(out) / record["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == record["hash"]
            assert record["file"] not in found, "once each"
            found[record["file"]] = record["hash"]
    files = {path.name for path in Path(out).iterdir() if path.suffix == ".png"}
    assert files == found.keys()
    return found


def mixed(count):
    """Return unlike requests: samplers, steps, sizes, scales, several pictures, an image."""
    chosen, lines = random.Random(1), []
    for index in range(count):
        line = {
            "prompt": f"a {chosen.choice(('red', 'blue'))} {chosen.choice(('hat', 'cat', 'car'))}",
            "sampler": chosen.choice(("ddim", "euler_a", "dpmpp_2m")),
            "num_inference_steps": chosen.randint(1, 4),
            "guidance_scale": chosen.choice((1.0, 3.0, 5.0)),
            "height": chosen.choice((32, 64)),
        }
        line |= [
            {},
            {"seed": index},
            {"num_images_per_prompt": 2},
            {"image": "a.png", "strength": 1.0},
        ][index % 4]
        lines.append(line)
    return lines


def test_pictures_are_what_they_are_alone_in_shared_calls(monkeypatch, capsys):
    step_rows, sizes = adapted_model.step_rows, []

    def count(rows, engine, **options):
        sizes.append(len(rows))
        step_rows(rows, engine, **options)

    monkeypatch.setattr(adapted_model, "step_rows", count)
    lines = [
        {"prompt": "a cat", "seed": 1},
        {"prompt": "a dog", "seed": 2, "sampler": "euler_a", "num_inference_steps": 3},
        {"prompt": "a hat", "seed": 3, "num_images_per_prompt": 2, "guidance_scale": 3.0},
    ]
    assert draw(write(*lines)) == 0
    assert capsys.readouterr().out == "4 pictures are in out\n"
    assert sizes == [4, 4, 1]
    pipeline = Pipeline.load(settings=BackendSettings(backend="cpu", threads=1))
    common = {"height": 32, "width": 32, "num_inference_steps": 2}
    alone = [image for line in lines for image in pipeline(**{**common, **line}).images]
    names = ("000001.png", "000002.png", "000003-1.png", "000003-2.png")
    assert sorted(hashes()) == [*names]
    for name, image in zip(names, alone, strict=True):
        np.testing.assert_array_equal(pixels(Path("out") / name), image)


def test_a_picture_is_drawn_again_by_its_own_file(capsys):
    assert draw(write({"prompt": "a {red|blue} cat", "num_inference_steps": 1})) == 0
    again = ["draw", "--again", "out/000001.png", "-o", "again.png", "--threads", "1"]
    subprocess.run([sys.executable, "-m", "latentrt", *again], env=environment(), check=True)
    np.testing.assert_array_equal(pixels("out/000001.png"), pixels("again.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("count", "kills", "longest"),
    [(48, 3, 0.1), pytest.param(500, 10, 1.0, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_loses_and_repeats_nothing(count, kills, longest):
    Image.new("RGB", (48, 32), "red").save("a.png")
    file = write(*mixed(count))
    command = [sys.executable, "-m", "latentrt", "batch", file, "--out", "out", *SMALL]
    chosen, manifest, drawn = random.Random(os.urandom(8)), Path("out/manifest.jsonl"), {}

    def length():
        return manifest.stat().st_size if manifest.exists() else 0

    for kill in range(kills):
        # The first as it starts, the others not long after a record that is new.
        before, wait = length(), chosen.uniform(0, longest)
        with subprocess.Popen([*command, "--seed", "7"], env=environment()) as run:
            while length() == before and kill and run.poll() is None:
                time.sleep(0.001)
            time.sleep(wait)
            run.kill()
        whole, _, _ = (manifest.read_text() if kill else "").rpartition("\n")
        for name in (json.loads(line)["file"] for line in whole.splitlines()):
            drawn.setdefault(name, (Path("out") / name).stat().st_ino)
    assert 0 < len(drawn) < count, "there was something to kill, and something is left"
    subprocess.run([*command, "--seed", "7"], env=environment(), check=True)
    assert draw(file, "--seed", "7", out="unbroken") == 0
    assert hashes("out") == hashes("unbroken")
    assert len(hashes("out")) == count + count // 4
    assert {name: (Path("out") / name).stat().st_ino for name in drawn} == drawn, "drawn once"
    kept = {"batch.json", "manifest.jsonl", ".lock"}
    assert {p.name for p in Path("out").iterdir() if p.suffix != ".png"} == kept


def test_without_a_seed_the_first_run_draws_it(capsys):
    file = write("a cat", "a dog")
    assert draw(file) == 0
    before = hashes()
    (Path("out") / "000002.png").unlink()
    assert draw(file) == 0
    assert records()[-1]["hash"] == before["000002.png"], "the same, of its seed"
    assert len(records()) == 3


def test_what_is_done_is_not_done_again(monkeypatch, capsys):
    file = write("a cat")
    assert draw(file) == 0
    monkeypatch.setattr(Pipeline, "load", None)
    assert draw(file) == 0
    assert capsys.readouterr().out == "1 pictures are in out\n" * 2


def test_lines_may_be_added_and_mended(capsys):
    assert draw(write("a cat", {"prompt": "a hat", "steps": 3}, 7)) == 1
    said = capsys.readouterr()
    assert "line 2 is passed over: steps is no option; did you mean num_inference" in said.err
    assert "line 3 is passed over: it is neither an object nor a text" in said.err
    assert "2 lines or pictures were passed over, manifest.jsonl" in said.out
    before = hashes()
    assert draw("requests.jsonl") == 1
    assert len(records()) == 3, "an error is recorded once"
    assert draw(write("a cat", "a hat", "a dog", "a car")) == 0
    assert hashes().items() > before.items()
    assert [r["line"] for r in records()] == [2, 3, 1, 2, 3, 4]
    assert [r["error"] is None for r in records()] == [False, False, True, True, True, True]


def test_a_line_that_has_become_another_is_refused(capsys):
    assert draw(write("a cat", "a dog")) == 0
    before = hashes()
    assert draw(write("a hat", "a dog")) == 2
    assert "line 1 of requests.jsonl is another request" in capsys.readouterr().err
    assert hashes() == before


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "1", "was begun with --steps 2, and now it is 1"),
        ("--seed", "8", "was begun with --seed 7, and now it is 8"),
        ("--format", "webp", "was begun with format 'png', and now it is 'webp'"),
        ("--lora", "style.safetensors", "was begun with "),
        ("--hires", "2", "was begun with --hires None, and now it is 2.0"),
    ],
)
def test_other_options_are_refused(option, value, said, here, capsys):
    write_lora(here).rename("style.safetensors")
    assert draw(write("a cat"), "--seed", "7") == 0
    assert draw(write("a cat", "a dog"), "--seed", "7", option, value) == 2
    assert said in capsys.readouterr().err
    assert len(hashes()) == 1


def test_what_a_kill_leaves_is_repaired(capsys):
    file = write("a cat", "a dog", "a hat")
    assert draw(file, "--seed", "7") == 0
    before, manifest = hashes(), Path("out/manifest.jsonl")
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(lines[0] + b"\0\0\0\n" + b'{"line": {}}\n' + lines[1][:-20])
    Path("out/.0123456789abcdef.tmp").write_bytes(b"half")
    assert draw(file) == 0
    text = manifest.read_bytes()
    assert text.startswith(lines[0] + b"\0\0\0\n" + b'{"line": {}}\n{')
    manifest.write_bytes(text.replace(b"\0\0\0\n", b"").replace(b'{"line": {}}\n', b""))
    assert hashes() == before
    assert not Path("out/.0123456789abcdef.tmp").exists()


@pytest.mark.parametrize("name", ["000001.png", "manifest.jsonl", ".0123456789abcdef.tmp"])
def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(name, capsys):
    Path("out").mkdir()
    (Path("out") / name).write_bytes(b"mine")
    assert draw(write("a cat")) == 2
    assert f"holds {name!r} and was not begun by this command" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in Path("out").iterdir()] == [(name, b"mine")]


def test_an_empty_folder_is_taken_and_not_removed(capsys):
    Path("out").mkdir()
    assert draw(write(7)) == 2
    assert [*Path("out").iterdir()] == []
    assert draw(write("a cat")) == 0


@pytest.mark.parametrize("facts", [b"", b"[]", b'{"seed": "a", "options": {}}', b"[" * 100_000])
def test_a_folder_whose_facts_are_none_is_refused(facts, capsys):
    Path("out").mkdir()
    Path("out/batch.json").write_bytes(facts)
    assert draw(write("a cat")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_another_process_has_is_refused(capsys):
    file = write("a cat")
    assert draw(file) == 0
    with opened_folder(Path("out")):
        assert draw(file) == 2
    assert "another process draws into out" in capsys.readouterr().err


def test_requests_that_are_closed_to_us_are_named(monkeypatch, capsys):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("runtime.batch.lines.Path.is_file", closed)  # root may everything
    assert draw("requests.jsonl") == 2
    assert "error: requests.jsonl cannot be used (Permission denied)" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("lines", [[], [7, {"prompt": 7}]])
def test_a_file_without_requests_leaves_nothing_behind(lines, capsys):
    assert draw(write(*lines)) == 2
    assert "has no line that can be drawn" in capsys.readouterr().err
    assert not Path("out").exists()


def test_many_bad_lines_are_counted(capsys):
    assert draw(write("a cat", *range(50))) == 1
    said = capsys.readouterr().err
    assert said.count("is passed over") == 20
    assert "and 30 more lines" in said
    assert len(records()) == 51


def test_a_row_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    file = write("a cat", "poison", "a dog", "a hat", {"prompt": "late", "width": 40})
    assert draw(file, "--seed", "7", out="whole") == 0
    step_rows = adapted_model.step_rows

    def fail(rows, engine, **options):
        if len(rows) > 2:
            raise BackendError("out of memory")
        if any("poison" in row.plan.settings[0]["prompt"] for row in rows):
            raise BackendError("it is poison")
        step_rows(rows, engine, **options)

    finite = np.isfinite
    with monkeypatch.context() as patched:
        patched.setattr(adapted_model, "step_rows", fail)
        patched.setattr(
            drawing.np, "isfinite", lambda x: finite(x) & (x.shape[-1] != 5), raising=True
        )
        assert draw(file, "--seed", "7") == 1
    said = capsys.readouterr().err
    assert "line 2 is passed over: it is poison" in said
    assert "line 5 is passed over: the model gave latents that are no numbers" in said
    before = hashes()
    assert sorted(before) == ["000001.png", "000003.png", "000004.png"]
    assert draw(file) == 0
    assert hashes() == hashes("whole"), "what failed is tried again"
    assert before.items() < hashes().items()


def test_a_request_that_the_model_cannot_draw_is_passed_over(capsys):
    assert draw(write("a cat", {"prompt": "a dog", "height": 33}, "a hat")) == 1
    assert "line 2 is passed over: height is 33; it must be a mult" in capsys.readouterr().err
    assert len(hashes()) == 2


def test_adapters_that_prompts_name_are_drawn_together(here, monkeypatch):
    path = write_lora(here)
    (here / "loras").mkdir()
    for name in "ab":
        shutil.copy(path, here / "loras" / f"{name}.safetensors")
    prompts = ["a cat", "a cat<lora:a:1>", "a cat{<lora:b:0.3>|<lora:b:0.3>}", "a cat"]
    file = write(*({"prompt": prompt, "seed": 1} for prompt in prompts * 3))
    put_on, switched = Pipeline._put_on, []

    def count(self, adapters):
        switched.append([choice.known_as for _, choice in adapters])
        put_on(self, adapters)

    monkeypatch.setattr(Pipeline, "_put_on", count)
    assert draw(file, "--lora-dir", "loras") == 0
    assert switched == [["a"], ["b"]], "not once a line"
    pipeline = Pipeline.load(
        lora_dir=here / "loras", settings=BackendSettings(backend="cpu", threads=1)
    )
    for index, prompt in enumerate(prompts, start=1):
        settings = {"seed": 1, "num_inference_steps": 2, "height": 32, "width": 32}
        (alone,) = pipeline(prompt, **settings).images
        for number in (index, index + 4, index + 8):
            np.testing.assert_array_equal(pixels(f"out/{number:06}.png"), alone)


def test_a_disk_that_is_full_is_one_sentence_and_the_rest_is_kept(monkeypatch, capsys):
    file = write(*(f"a {name}" for name in ("cat", "dog", "hat", "car", "cup", "key")))
    write_atomically, written = store.write_atomically, []

    def full(path, write):
        if len(written) == 2:
            raise OutputError("the disk is full")
        written.append(path)
        write_atomically(path, write)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_atomically", full)
        assert draw(file) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert len(hashes()) == 2
    assert draw(file) == 0
    assert len(hashes()) == 6


def test_a_record_that_does_not_fit_is_not_half_written():
    Path("out").mkdir()
    with Manifest.opened(Path("out")) as manifest:
        manifest.add({"line": 1})
        file = manifest._file

        class Full:
            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, text):
                return file.write(text[:5])

        manifest._file = Full()
        with pytest.raises(OSError, match="No space"):
            manifest.add({"line": 2})
        manifest._file = file
        manifest.add({"line": 3})
    assert records() == [{"line": 1}, {"line": 3}]


def test_pictures_of_a_line_fail_each_by_itself(monkeypatch, capsys):
    def fail(rows, engine, **options):
        raise BackendError("it fails")

    monkeypatch.setattr(adapted_model, "step_rows", fail)
    assert draw(write({"prompt": "a cat", "num_images_per_prompt": 2})) == 1
    assert [(r["picture"], r["error"]) for r in records()] == [(0, "it fails"), (1, "it fails")]
    assert capsys.readouterr().out.startswith("0 pictures are in out; 2 lines or pictures")


def test_an_interrupt_keeps_what_is_finished(monkeypatch, capsys):
    file = write(*(f"a {name}" for name in ("cat", "dog", "hat", "car", "cup", "key")))
    step_rows, calls = adapted_model.step_rows, []

    def interrupt(rows, engine, **options):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step_rows(rows, engine, **options)

    with monkeypatch.context() as patched:
        patched.setattr(adapted_model, "step_rows", interrupt)
        assert draw(file) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(hashes()) == 4
    assert draw(file) == 0
    assert len(hashes()) == 6


def test_where_neighbours_change_bits_the_size_of_a_call_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(Engines, "is_exact", False)
    step_rows, filled = adapted_model.step_rows, []

    def count(rows, engine, *, filled_to, **options):
        filled.append((len(rows), filled_to))
        step_rows(rows, engine, filled_to=filled_to, **options)

    monkeypatch.setattr(adapted_model, "step_rows", count)
    assert draw(write("a cat", "a dog", "a hat"), "--batch-size", "2") == 0
    assert filled == [(2, 2), (2, 2), (1, 2), (1, 2)]
    assert read_settings("out/000003.png")["batch_size"] == 2
    assert draw(write("a cat", "a dog", "a hat", "a car"), "--batch-size", "3") == 2
    assert "was begun with --batch-size 2, and now it is 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["requests.txt", "requests.csv", "requests.parquet"])
def test_every_format_is_drawn(name, capsys):
    if name.endswith("parquet"):
        parquet, table = pytest.importorskip("pyarrow.parquet"), sys.modules["pyarrow"].table
        parquet.write_table(table({"prompt": ["a cat", "a dog"]}), name)
    else:
        header = "prompt\n" if name.endswith("csv") else ""
        Path(name).write_text(f"{header}a cat\na dog\n")
    options = ("--seed", "7", "--no-mark", "--format", "JPG")
    assert draw(name, *options) == 0
    lines = [record["line"] for record in records()]
    assert lines == ([2, 3] if name.endswith("csv") else [1, 2])
    files = [(Path("out") / record["file"]).read_bytes() for record in records()]
    assert all(data.startswith(b"\xff\xd8\xff") for data in files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "gif"], "--format is 'gif'; choose one of png"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "1,2"], "--seed is (1, 2)"),
        (["--model", "nosuch"], "nosuch"),
        (["--image", "nosuch.png"], "nosuch.png cannot be read"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(options, said, capsys):
    assert draw(write("a cat"), *options) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()
