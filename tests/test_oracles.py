"""The tests that need no oracle are collected where no oracle is installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.oracles import ORACLES, missing_for, oracles

ROOT = Path(__file__).parents[1]
END = "collected with"
CHOICES = ("not oracle and not slow", "")
SKIP_THEMSELVES = {
    "tests/standin/test_standin.py",
    "tests/benchmarks/test_bfloat16.py",
    "tests/benchmarks/test_layers.py",
    "tests/engine/backends/openvino/test_engine.py",
    "tests/engine/backends/openvino/test_float32_ends.py",
    "tests/engine/graphs/test_graph.py",
    "tests/engine/graphs/test_writer.py",
}


# Collects with one choice after the other: what the first imports is there for the others.
COLLECT = f"""
import sys
sys.modules |= dict.fromkeys({sorted(ORACLES)})
import pytest
for chosen in sys.argv[1:]:
    status = pytest.main(["--collect-only", "-p", "no:cacheprovider", "-m", chosen])
    print(f"{END} {{status:d}}", flush=True)
"""


@pytest.fixture(scope="module")
def collected():
    """What each choice collects in a process without oracles, as a status and what is shown."""
    command = [sys.executable, "-c", COLLECT, *CHOICES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    shown = re.split(rf"^{END} (\d+)\n", done.stdout, flags=re.MULTILINE)
    assert len(shown) == 2 * len(CHOICES) + 1, done.stderr[-3000:]
    return dict(zip(CHOICES, zip(shown[1::2], shown[:-1:2], strict=True), strict=True))


@pytest.mark.parametrize("chosen", CHOICES)
def test_files_are_collected_without_the_oracles(collected, chosen):
    status, shown = collected[chosen]
    assert status == "0", shown[-3000:]
    files = {line.partition("::")[0] for line in shown.splitlines() if "::" in line}
    mirrored = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    free = {path for path in mirrored if not oracles(ROOT / path)}
    assert len(free) > len(mirrored) // 3
    assert files == free - SKIP_THEMSELVES
    assert "for want of: " in shown
    assert "torch (" in shown


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
