"""Pictures that are finished stay: names, groups, closed pipes, terminals, interrupts."""

import io
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.__main__ as command
from latentrt.__main__ import main
from runtime import Pipeline
from runtime.images.files import read_settings
from runtime.terminal import show_progress
from tests.support.tolerances import GROUPED_MEMORY

ROOT = Path(__file__).parents[2]
SMALL = ("--height", "32", "--width", "32", "--steps", "1", "--threads", "1", "--seed", "7")
MEMORY = """
import resource, sys
from runtime.__main__ import main
sys.stdout = None
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.__stdout__)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def process(*arguments, **streams):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "runtime", *arguments]
    return subprocess.Popen(words, env=environment, **streams)


def test_a_default_name_takes_the_next_number(here, capsys):
    for scale in ("3", "9", "5"):
        assert command.main(["🍎 a red apple", *SMALL, "--guidance-scale", scale]) == 0
    names = ["a-red-apple-7.png", "a-red-apple-7-2.png", "a-red-apple-7-3.png"]
    assert capsys.readouterr().out.split() == names
    assert files(here) == sorted(names)
    assert [read_settings(here / name)["guidance_scale"] for name in names] == [3, 9, 5]
    assert command.main(["a", *SMALL, "--out", names[0]]) == 0
    assert read_settings(here / names[0])["prompt"] == "a", "a name that is given is meant"


def test_equal_names_within_a_run_and_of_steps(here, capsys):
    flags = ("--preview-steps", "1", "--seed", "3,3")
    for _ in range(2):
        assert command.main(["a", *SMALL, *flags]) == 0
    assert files(here) == sorted(capsys.readouterr().out.split())
    assert len(files(here)) == 6


def test_the_reader_of_a_pipe_goes_away(here):
    drawing = process(
        "a", *SMALL, "--num-images", "6", "--out", "a.png",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with drawing:
        drawing.stdout.close()
        assert drawing.stderr.read() == b""
    assert drawing.returncode == 0
    assert files(here) == [f"a-{i}.png" for i in range(1, 7)]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no full device")
def test_a_full_disk_under_the_output(here):
    with Path("/dev/full").open("w") as full:
        drawing = process("a", *SMALL, "--out", "a.png", stdout=full, stderr=full)
    assert drawing.wait() == 0
    assert files(here) == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX's")
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start(here, closed):
    words = f'"{sys.executable}" -m runtime a {" ".join(SMALL)} --out a.png {closed}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, shell=True, env=environment).returncode == 0
    assert files(here) == ["a.png"]


def test_an_app_without_streams(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command.main(["a", *SMALL, "--out", "a.png"]) == 0
    assert command.main(["a", *SMALL, "--height", "3"]) == 2
    assert files(here) == ["a.png"]


class Terminal(io.StringIO):
    def __init__(self, encoding="utf-8"):
        super().__init__()
        self.known = encoding

    encoding = property(lambda self: self.known)

    def isatty(self):
        return True

    def write(self, text):
        text.encode(self.known)
        return super().write(text)

    def fileno(self):
        return 99


@pytest.mark.parametrize("columns", [1, 5, 12, 20, 80, 300])
def test_the_bar_stays_within_a_line(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    for step in range(1, 101):
        show_progress(step, 100)
    lines = terminal.getvalue().rstrip("\n").split("\r")[1:]
    assert len(lines) == 100
    assert all(len(line) < max(columns, 2) for line in lines)
    assert columns < 14 or lines[-1].endswith(" step 100/100")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_the_bar_in_another_encoding(monkeypatch, encoding):
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    show_progress(1, 2)
    bar = "█░" if encoding == "utf-8" else "#."
    assert terminal.getvalue() == f"\r{bar[0] * 15}{bar[1] * 15} step 1/2"


def test_an_interrupt_keeps_what_is_done(here, capsys, monkeypatch):
    denoise, groups = Pipeline.denoise, count()

    def interrupted(self, plan):
        if next(groups) == 2:
            raise KeyboardInterrupt
        return denoise(self, plan)

    monkeypatch.setattr(Pipeline, "denoise", interrupted)
    flags = ("--num-images", "6", "--batch-size", "2", "--out", "a.webp")
    assert command.main(["a", *SMALL, *flags]) == 130
    said = capsys.readouterr()
    assert said.out.split() == files(here) == [f"a-{i}.webp" for i in range(1, 5)]
    assert said.err == "\ncancelled; only the pictures named above were written\n"


def test_an_error_keeps_what_is_done(here, capsys):
    (here / "a-3.png").mkdir()
    flags = ("--num-images", "4", "--batch-size", "1", "--out", "a.png")
    assert command.main(["a", *SMALL, *flags]) == 2
    assert "a-3.png is a folder" in capsys.readouterr().err
    assert files(here) == ["a-3.png"], "what is known before is said before"


def test_groups_make_the_files_that_one_picture_makes(here):
    flags = ("--num-images", "3", "--guidance-interval", "0:0.5", "--steps", "2")
    for size in (1, 3):
        assert (
            command.main(["a", *SMALL, *flags, "--batch-size", str(size), "-o", f"{size}.png"]) == 0
        )
    for i in (1, 2, 3):
        assert (here / f"1-{i}.png").read_bytes() == (here / f"3-{i}.png").read_bytes()
    assert command.main(["--again", "3-2.png", "--threads", "1", "--out", "again.png"]) == 0
    with Image.open("3-2.png") as first, Image.open("again.png") as again:
        np.testing.assert_array_equal(first, again)
    assert command.main(["a", *SMALL, "--batch-size", "0"]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="it says nothing of its memory")
def test_many_pictures_take_little_more_memory_than_four(here):
    peaks = {}
    for number in (4, 64):
        words = ["a", "--steps", "1", "--threads", "1", "-n", str(number), "--out", "a.png"]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        status, peaks[number] = map(int, done.stdout.split())
        assert status == 0
    assert len(files(here)) == 68 - 4, "numbered alike"
    assert peaks[64] <= GROUPED_MEMORY * peaks[4]


@pytest.mark.parametrize(
    "words", [("calibrate", "pictogram"), ("bench", "overhead", "--out", "figures.json")]
)
def test_no_long_work_is_begun_for_a_closed_folder(here, words, capsys, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(here / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may everything
    for work in ("runtime.calibration.Pipeline", "benchmarks.__main__._measure"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("it was begun"))
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert "may not be written to; choose another" in said
    assert said.count("\n") == 1


def test_a_picture_and_its_animation_have_names_of_their_own(here, capsys):
    assert command.main(["a", *SMALL, "-o", "a.webp", "--animation", "./a.webp"]) == 2
    assert "--animation and --out are one file" in capsys.readouterr().err
    assert not list(here.iterdir())
