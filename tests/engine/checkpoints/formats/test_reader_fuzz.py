import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tolerances import READERS_PEAK_BYTES

ROOT = Path(__file__).parents[4]
SECONDS = os.environ.get("LATENTRT_FUZZ_SECONDS", "10")


def test_fuzzed_files_open_or_are_refused(tmp_path):
    pytest.importorskip("safetensors")  # which writes the files to damage
    fuzz = subprocess.run(
        [sys.executable, "-m", "tests.support.reader_fuzz", tmp_path / "fuzz", SECONDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fuzz.returncode == 0, fuzz.stderr[-3000:]
    result = json.loads(fuzz.stdout)
    assert result["opened"] > 10
    assert result["refused"] > 100
    assert result["peak"] < READERS_PEAK_BYTES
