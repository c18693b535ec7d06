import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoints.formats.files import open_weights, require_finite
from engine.errors import ModelError
from tests.support.bad_files import bad_files
from tests.support.bad_pickles import running
from tests.support.tolerances import READERS_PEAK_BYTES

ROOT = Path(__file__).parents[4]
# In a process of its own, whose memory is the readers' alone.
OPEN_ALL = """
import json, sys
from pathlib import Path
from benchmarks.machine import peak_bytes
from engine.errors import ModelError
from engine.checkpoints.formats.files import open_weights

refused = 0
for path in map(Path, json.load(sys.stdin)):
    try:
        open_weights(path)
    except ModelError as error:
        refused += 1
assert not {"torch", "safetensors", "zipfile"} & sys.modules.keys()
peak = peak_bytes()
json.dump({"refused": refused, "peak": peak}, sys.stdout)
"""


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opened(path):
    """Open a file as far as the readers go: the message, or nothing when it is well."""
    try:
        for name, array in open_weights(path).items():
            require_finite(path, name, array)
    except ModelError as error:
        return str(error)
    return ""


def test_every_bad_file_is_refused_in_one_clear_sentence(tmp_path):
    corpus = bad_files(tmp_path)
    before = listing(tmp_path)
    for bad in corpus:
        message = opened(bad.path)
        if bad.stage == "foreign":
            assert message == "", bad.name
            continue
        assert re.search(bad.message, message), (bad.name, message)
        assert str(bad.path) in message
        assert "\n" not in message
        assert len(message) < 500 + len(str(bad.path)), bad.name
    assert listing(tmp_path) == before  # and no canary


def test_bad_files_take_little_memory(tmp_path):
    corpus = bad_files(tmp_path)
    before = listing(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", OPEN_ALL],
        input=json.dumps([str(bad.path) for bad in corpus]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    result = json.loads(run.stdout)
    assert result["refused"] == sum(bad.stage == "opening" for bad in corpus)
    assert result["peak"] < READERS_PEAK_BYTES
    assert listing(tmp_path) == before


def test_the_corpus_is_large_and_always_the_same(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bad = bad_files(tmp_path / name)
        made.append([(each.name, each.stage) for each in bad])
    assert made[0] == made[1]
    contents = [
        {path.relative_to(tmp_path / name): content for path, content in listing(folder).items()}
        for name in ("a", "b")
        if (folder := tmp_path / name)
    ]
    ours = str(tmp_path / "a").encode(), str(tmp_path / "b").encode()
    assert len(ours[0]) == len(ours[1])
    for path, content in contents[0].items():
        # The archives' checksums follow the canary's path.
        assert len(content) == len(contents[1][path])
        if ours[0] not in content and ours[0].replace(b"\\", b"\\\\") not in content:
            assert content == contents[1][path]
    assert len(set(made[0])) == len(made[0]) >= 60
    assert len({content for content in contents[0].values() if content}) >= 60


class Hostile(pickle.Unpickler):
    """Python's unpickler, with nothing of torch behind torch's names."""

    def find_class(self, module, name):
        if module.startswith("torch"):
            return lambda *_: None
        return super().find_class(module, name)

    def persistent_load(self, _):
        return None


@pytest.mark.parametrize("case", [name for name, _, _ in running("")])
def test_the_hostile_pickles_run_code_in_pythons_unpickler(tmp_path, case):
    canary = tmp_path / "canary"
    pickled = {name: pickled for name, pickled, _ in running(str(canary))}[case]
    with contextlib.suppress(Exception):
        Hostile(io.BytesIO(pickled)).load()
    assert canary.exists()


def test_the_corpus_can_be_written_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "tests.support.bad_files", tmp_path / "corpus"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(made.stdout.splitlines()) == len(list((tmp_path / "corpus").iterdir())) >= 60
