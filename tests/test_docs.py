"""Commands and code of the pages run as they are written, or say what to bring."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import __main__ as benchmarks
from export import __main__ as export
from latentrt.__main__ import SUBCOMMANDS
from runtime import preprocess, upscale
from runtime.batch import __main__ as batch
from runtime.options import make_parser
from serving import options as serving
from tests.support.pictures import drawing
from training import __main__ as training

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)
BRING = re.compile(r"# bring: (.+)\n")
PICTURES = {"photo.png", "hat.png"}  # which the tests bring
NOT_OURS = ("pip", "pytest", ".ci/run", "printf", "serve")
MAX_README = 140  # lines


def blocks(kind):
    """Return (page, code, what to bring) of every block of a kind."""
    found = []
    for page in PAGES:
        for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == kind:
                first = BRING.match(code)
                brought = set(first[1].split(", ")) if first else set()
                found.append((page, code.removeprefix(first[0] if first else ""), brought))
    return found


def commands(code):
    """Return the commands of a block as words, those of installers and tests left out."""
    joined = code.replace("\\\n", " ")
    lines = [part for line in joined.splitlines() for part in line.split(" && ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [each for each in words if each and each[0] not in NOT_OURS]


def parsed(words):
    """Read a command's options as it would, without running it."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"]:
        name, given = words[2], words[3:]
    else:
        assert words[0] == "latentrt", words
        name = words[1] if words[1] in SUBCOMMANDS else "draw"
        given = words[2:] if words[1] in SUBCOMMANDS else words[1:]
    if name in ("runtime", "draw"):
        make_parser("latentrt").parse_args(given)
    elif name == "export":
        command = given[0] if given[0] in export._COMMANDS else "model"
        export._PARSERS[command]("export").parse_args(given[command != "model" :])
    elif name == "training":
        training.parser(training.COMMANDS, None).parse_args(given)
    elif name in ("benchmarks", "bench"):
        benchmarks._parser("bench").parse_args(given)
    elif name == "upscale":
        upscale.make_parser("upscale").parse_args(given)
    elif name == "batch":
        batch.make_parser("batch").parse_args(given)
    elif name == "serve":
        serving.make_parser("serve").parse_args(given)
    elif name == "preprocess":
        preprocess._parser("preprocess").parse_args(given)
    else:
        assert name in ("info", "calibrate"), words


def test_there_are_blocks():
    assert len(blocks("sh")) > 12
    assert len(blocks("python")) > 5


@pytest.mark.parametrize(("page", "code", "brought"), blocks("sh"))
def test_every_option_is_known(page, code, brought):
    for words in commands(code):
        parsed(words)


RUNNABLE = [each for each in blocks("sh") if each[2] <= PICTURES and commands(each[1])]


@pytest.mark.parametrize(("page", "code", "brought"), RUNNABLE)
def test_commands_run_as_they_are_written(page, code, brought, tmp_path):
    drawing(128, 128).save(tmp_path / "photo.png")
    Image.new("L", (128, 128), 255).crop((0, 0, 64, 64)).save(tmp_path / "hat.png")
    if "apple.png" in code and "-o apple.png" not in code:  # what the block before has drawn
        run(["latentrt", "a red apple", "--steps", "1", "-o", "apple.png"], tmp_path)
    for words in commands(code):
        run(words, tmp_path)


def run(words, folder):
    replaced = {"latentrt": [sys.executable, "-m", "latentrt"], "python": [sys.executable]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LATENTRT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*replaced[words[0]], *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (words, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs_as_it_is_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for where, code, brought in blocks("python"):
        if where == page:
            compiled = compile(code, page.name, "exec")
            if not brought:
                exec(compiled, names)


def test_the_readme_can_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README


def test_links_of_pages_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)?", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_files_that_pages_name_are_there():
    """A path in backticks that begins with a package is one of a file or a folder."""
    pattern = re.compile(
        r"`((?:engine|runtime|export|training|benchmarks|latentrt|tests|deploy)/[\w./]*)`"
    )
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for name in pattern.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), (page.name, name)
