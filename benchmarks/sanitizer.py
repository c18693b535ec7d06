"""NVIDIA's compute-sanitizer on a picture of the model that ships: whose memory a kernel touches.

compute-sanitizer looks at every access of every kernel to the GPU's memory. It comes with the CUDA
toolkit, which nothing else here needs.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import BackendError

__all__ = ["find_tool", "sanitizer_figures"]

TOOL = "compute-sanitizer"
FOLDERS = ("CUDA_HOME", "CUDA_PATH")  # variables that say where the toolkit is
DEFAULT = "/usr/local/cuda"
MARK = "========="
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
FIRST = 10  # lines of its report that are kept


def find_tool() -> str | None:
    """Return the program, from the path or from the toolkit's folder; None where it is not."""
    homes = [*filter(None, map(os.environ.get, FOLDERS)), DEFAULT]
    places = (str(Path(home) / place) for home in homes for place in ("bin", TOOL))
    return shutil.which(TOOL) or next(
        (found for place in places if (found := shutil.which(TOOL, path=place))), None
    )


def sanitizer_figures(tool: str | None, backend: str, seconds: float) -> dict[str, Any]:
    """Draw a picture of 64 pixels in two steps under the tool, or by itself where it is None.

    seconds: that it may take. Returns how many errors there were, and the report's first lines.
    Raises BackendError where the picture was not drawn, or not in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture, said = Path(folder) / "picture.png", Path(folder) / "report"
        command = [sys.executable, "-m", "latentrt", "a red apple, fluent style"]
        command += ["--backend", backend, "--steps", "2", "--height", "64", "--width", "64"]
        command += ["--out", str(picture)]
        if tool is not None:
            command = [tool, "--tool", "memcheck", "--log-file", str(said), *command]
        status, errors = _run(command, seconds)
        report = said.read_text(errors="replace").splitlines() if said.exists() else []
        if not picture.is_file():
            last = [line for line in (*report, *errors.splitlines()) if line.strip()][-1:]
            raise BackendError(f"no picture was drawn, with the status {status}: {''.join(last)}")
    if tool is None:
        return {"tool": None}
    lines = [line.removeprefix(MARK).strip() for line in report]
    counts = [int(found[1]) for line in lines if (found := SUMMARY.search(line))]
    if not counts:
        raise BackendError(f"{tool} wrote no summary: {' '.join(lines[-1:])}")
    return {"tool": "memcheck", "errors": sum(counts), "first": [*filter(None, lines)][:FIRST]}


def _run(command: Sequence[str], seconds: float) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise BackendError(f"the picture was not drawn within {seconds:.0f} s") from None
    return done.returncode, done.stderr
