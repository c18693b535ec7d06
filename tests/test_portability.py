"""What Windows and macOS differ in: modules that only Linux has, encodings, names of files."""

import json
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from engine.adapters.choice import parse_adapter
from engine.checkpoints.formats.files import open_weights
from engine.errors import ModelError

ROOT = Path(__file__).parents[1]
DRAW = ["--steps", "1", "--threads", "1", "--backend", "cpu", "--height", "64", "--width", "64"]
ELSEWHERE = """
import os, pkgutil, sys, types
from importlib import import_module

# What is made for every system, and looks at which it is when it is imported.
import ctypes, mmap, multiprocessing, shutil, signal, subprocess, tempfile, threading, zipfile
import numpy, onnxruntime, PIL.Image, tokenizers

for name in {modules}:
    sys.modules[name] = None
for name in {functions}:
    delattr(os, name)
locks = []
sys.modules["msvcrt"] = types.SimpleNamespace(
    LK_LOCK=1, LK_NBLCK=2, LK_UNLCK=0, locking=lambda *given: locks.append(given)
)
sys.platform = {platform!r}

def audit(event, given):
    if event == "open" and str(given[0]).startswith(("/proc", "/sys", "/dev/shm")):
        raise FileNotFoundError(given[0])

sys.addaudithook(audit)
count = 0
for package in ("engine", "runtime", "latentrt"):
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{{package}}."):
        if not module.name.endswith("__main__") or module.name == "runtime.__main__":
            import_module(module.name)
            count += 1

from engine.backends.settings import BackendSettings
from runtime import Pipeline
pipeline = Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))
pipeline("a hat", num_inference_steps=1, height=64, width=64)
print(count)
"""


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


# What a system lacks of Linux' modules and of `os`.
LACKS = {
    "darwin": ((), ("sched_getaffinity",)),
    "win32": (
        ("fcntl", "grp", "pwd", "resource", "termios"),
        ("fork", "getuid", "killpg", "sched_getaffinity", "statvfs", "uname", "fchmod"),
    ),
}


@pytest.mark.parametrize("platform", LACKS)
def test_every_module_is_imported_and_draws_without_what_linux_has(platform, tmp_path):
    """Windows and macOS as far as Linux can play them: without /proc and POSIX' modules."""
    modules, functions = LACKS[platform]
    code = ELSEWHERE.format(platform=platform, modules=modules, functions=functions)
    done = run("-c", code, LATENTRT_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    files = [*ROOT.glob("engine/**/*.py"), *ROOT.glob("runtime/**/*.py")]
    assert int(done.stdout) > 0.9 * len(files)


def test_every_text_names_its_encoding(tmp_path):
    """Windows reads and writes text in the encoding of the country where a file names none."""
    picture = tmp_path / "hat.png"
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-m", "latentrt"]
    for command in (["a hat", *DRAW, "-o", str(picture)], ["info", str(picture)]):
        done = run(*strict, *command)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_pipe_that_lacks_characters_gets_escapes(tmp_path, encoding):
    picture = tmp_path / "ü ☕ 日本.png"
    prompt = "a ☕ 日本 café 🍎"
    done = run(*("-m", "latentrt", prompt, *DRAW, "-o", str(picture)), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "\\u2615" in done.stdout
    for form in ([], ["--json"]):
        told = run("-m", "latentrt", "info", str(picture), *form, PYTHONIOENCODING=encoding)
        assert told.returncode == 0, told.stderr
    assert prompt in json.dumps(json.loads(told.stdout), ensure_ascii=False)
    refused = run("-m", "latentrt", prompt, "--model", "☕", PYTHONIOENCODING=encoding)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("text", "path", "weights"),
    [
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", (1, 1)),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", (0.5, 0.5)),
        (r"C:\loras\a.safetensors:0.5:2", r"C:\loras\a.safetensors", (0.5, 2)),
        (r"\\server\share\a.pt:-1", r"\\server\share\a.pt", (-1, -1)),
        ("D:/loras/a b.pt:.5", "D:/loras/a b.pt", (0.5, 0.5)),
    ],
)
def test_an_adapter_on_a_drive_keeps_its_colon(text, path, weights):
    choice = parse_adapter(text)
    assert str(choice.path) == path
    assert (choice.unet, choice.text_encoder) == weights
    assert PureWindowsPath(path).is_absolute()


@pytest.mark.parametrize("name", ["..\\a.bin", "C:a.bin", "b\\a.bin", "\\\\server\\a", "../a.bin"])
def test_an_index_names_no_file_elsewhere_on_any_system(tmp_path, name):
    index = {"weight_map": {"weight": name}}
    for path in ("diffusion_pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (tmp_path / path).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="which is no file beside it"):
        open_weights(tmp_path)
