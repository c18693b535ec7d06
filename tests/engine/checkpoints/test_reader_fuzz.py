import json
import os
import subprocess
import sys
from pathlib import Path

from tolerances import READERS_PEAK_BYTES

SECONDS = os.environ.get("LATENTRT_FUZZ_SECONDS", "10")


def test_fuzzed_files_open_or_are_refused(tmp_path):
    script = Path(__file__).parents[2] / "reader_fuzz.py"
    fuzz = subprocess.run(
        [sys.executable, script, tmp_path / "fuzz", SECONDS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )
    assert fuzz.returncode == 0, fuzz.stderr[-3000:]
    result = json.loads(fuzz.stdout)
    assert result["opened"] > 10
    assert result["refused"] > 100
    assert result["peak"] < READERS_PEAK_BYTES
