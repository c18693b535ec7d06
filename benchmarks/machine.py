"""The machine that figures were measured on: what it is, and the most it can do."""

import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.settings import cpu_count

SIDE = 3000  # of the square matrices whose product is timed
REPEATS = 5


def describe() -> dict[str, Any]:
    """Name the processor, its cores, Python, and the peak of a float32 matrix product."""
    return {
        "processor": _cpu_name(),
        "cores": cpu_count(),
        "python": platform.python_version(),
        "peak_gflops": round(peak_gflops(), 1),
    }


def peak_gflops() -> float:
    """Measure a float32 matrix product on all cores, the median of several after a warm-up."""
    matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / statistics.median(seconds[1:]) / 1e9


def peak_bytes() -> int:
    """Return the most memory that this process has had resident.

    Where the system tells of this program alone: getrusage also counts the process that started
    it, before it became this program.
    """
    if value := _status("VmHWM"):
        return value
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> dict[str, int]:
    """Return what of this process is resident now, and the most that ever was, in bytes."""
    peak = peak_bytes()
    return {"resident_bytes": _status("VmRSS") or peak, "peak_bytes": peak}


def _status(name: str) -> int | None:
    """Return bytes that Linux tells of this process, or None elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the spread of repeated measurements."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
