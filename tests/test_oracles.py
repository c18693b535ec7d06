"""The tests that need no oracle are collected where no oracle is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.oracles import ORACLES, missing_for, oracles

ROOT = Path(__file__).parents[1]
NO_PLUGIN = ["-p", "no:schemathesis"]  # a plugin of pytest's that imports what is hidden
SKIP_THEMSELVES = {
    "tests/standin/test_standin.py",
    "tests/engine/backends/openvino/test_engine.py",
    "tests/engine/graphs/test_graph.py",
    "tests/engine/graphs/test_writer.py",
}


@pytest.mark.parametrize("chosen", ["not oracle and not slow", ""])
def test_files_are_collected_without_the_oracles(tmp_path, chosen):
    hidden = f"import sys; sys.modules |= dict.fromkeys({sorted(ORACLES)})"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            "-m",
            chosen,
            *NO_PLUGIN,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    mirrored = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    free = {path for path in mirrored if not oracles(ROOT / path)}
    assert len(free) > len(mirrored) // 3
    assert collected == free - SKIP_THEMSELVES
    assert "for want of: " in done.stdout
    assert "torch (" in done.stdout


def test_oracles_are_found_through_other_files():
    assert "diffusers" in oracles(ROOT / "tests/runtime/test_family_parity.py")
    assert "torch" in oracles(ROOT / "tests/export/test_islands.py")
    assert not oracles(ROOT / "tests/runtime/test_request.py")


def test_what_fails_for_want_of_an_oracle_is_skipped(monkeypatch):
    monkeypatch.setattr("tests.support.oracles.find_spec", {"cv2": object()}.get)
    absent = ModuleNotFoundError(name="safetensors.numpy")
    assert missing_for(absent) == "safetensors"
    with pytest.raises(ValueError, match="of it") as raised:
        raise ValueError("of it") from absent
    assert missing_for(raised.value) == "safetensors"
    assert missing_for(ModuleNotFoundError(name="cv2")) is None  # installed, so it is a mistake
    assert missing_for(ModuleNotFoundError(name="runtime.nowhere")) is None
    assert missing_for(ModuleNotFoundError("of no name")) is None
    assert missing_for(AssertionError()) is None
