"""The contenders that are open, and whether they compute what the reference computes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import MEASURED, PEAK, REFERENCE, Contender
from benchmarks.control_nets import ONE
from benchmarks.distances import relative_error
from benchmarks.scenarios import WHOLE, Scenario
from benchmarks.worker import ContenderError, Worker
from runtime.images.files import psnr

__all__ = ["WARM_UPS", "ContenderError", "Race"]

WARM_UPS = 2  # of each part; ONNX Runtime needs both.
WARMED = (WHOLE, ONE)  # are made of parts that were warmed up, so once more is enough
# Beyond these a contender computes something else: relative errors of numbers, and dB of pictures.
ALLOWED_ERROR = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15, "int8": 0.3}
ALLOWED_PSNR_DB = {"float32": 40.0, "float16": 20.0, "bfloat16": 15.0, "int8": 12.0}


class Race:
    """Opens and measures contenders.

    parts: of a contender; folder: where outputs are compared
    contenders: all that may be asked for
    expected: files of the outputs that others are compared with; those of REFERENCE where None
    """

    def __init__(
        self,
        scenario: Scenario,
        threads: int,
        parts: Callable[[str], tuple[str, ...]],
        folder: Path,
        *,
        contenders: Mapping[str, Contender] = MEASURED,
        expected: Mapping[str, Path] | None = None,
    ) -> None:
        self._scenario, self._threads = scenario, threads
        self._contenders = contenders
        self._reference = REFERENCE if expected is None else None
        self._parts, self._folder = parts, folder
        self._workers: dict[str, Worker] = {}
        self._measured: dict[str, list[str]] = {}
        self._expected = dict(expected or {})

    def open(self, name: str, taken: dict[str, Any], within_s: float = math.inf) -> bool:
        """Open a contender unless it is, warm it up, compare; raises ContenderError.

        Returns whether it had to be opened.
        """
        if name in self._workers:
            return False
        if self._reference and name not in (PEAK, self._reference) and not self._expected:
            try:
                self.open(self._reference, {})
            except ContenderError:
                self.drop(self._reference)
            self.make_room(self._reference)
        start, chosen = time.monotonic(), self._contenders[name]
        bound = min(self._scenario.ready_s, within_s)
        worker = self._workers[name] = Worker(name, self._scenario.key, self._threads)
        able = worker.ready(bound)["parts"]
        self._measured[name] = [part for part in self._parts(name) if part in able]
        outputs = {}
        for part in self._measured[name]:
            outputs[part] = self._folder / f"{[*self._contenders].index(name)}-{part}.npy"
            for _ in range(1 if part.startswith(WARMED) else WARM_UPS):
                worker.run(part, bound - (time.monotonic() - start), outputs[part])
        taken["ready_s"] = round(time.monotonic() - start, 2)
        if name == self._reference:
            self._expected = outputs
        elif chosen.precision and not (chosen.whole_only or chosen.saves or chosen.draws):
            taken["agreement"] = compare(outputs, self._expected, chosen.precision)
        return True

    def measure(
        self, name: str, parts: Sequence[str] | None = None
    ) -> tuple[dict[str, float], int]:
        """Run each part once, or these; returns seconds, and the process's most memory in bytes."""
        seconds, peak, scenario = {}, 0, self._scenario
        for part in self._measured[name] if parts is None else parts:
            bound = scenario.whole_s if part.startswith(WHOLE) else scenario.run_s
            answer = self._workers[name].run(part, bound)
            seconds[part], peak = round(answer["seconds"], 6), answer["memory"]["peak_bytes"]
        return seconds, peak

    def take(self, name: str, taken: dict[str, Any]) -> dict[str, float]:
        """Measure a contender once, opening it first; returns seconds by part.

        taken: its figures, to which how it opened and its memory are added
        Raises ContenderError, and the contender is closed then.
        """
        try:
            self.open(name, taken)
            seconds, peak = self.measure(name)
        except ContenderError:
            self.drop(name)
            raise
        taken["peak_bytes"] = max(peak, taken.get("peak_bytes", 0))
        return seconds

    def make_room(self, name: str) -> None:
        """Close a contender where the next would not find enough memory; it opens again."""
        if available_bytes() < self._scenario.headroom_bytes:
            self.drop(name)

    def drop(self, name: str) -> None:
        """End a contender's process, if it has one."""
        if worker := self._workers.pop(name, None):
            worker.close()

    def close(self) -> None:
        """End all processes."""
        for name in list(self._workers):
            self.drop(name)


def compare(
    outputs: Mapping[str, Path], expected: Mapping[str, Path], precision: str
) -> dict[str, Any]:
    """Compare what parts gave, as .npy files; returns the distances and whether they `agree`."""
    distances: dict[str, float | None] = {}
    agrees = []
    for part in [part for part in outputs if part in expected]:
        given, reference = np.load(outputs[part]), np.load(expected[part])
        if reference.dtype == np.uint8 and given.shape == reference.shape:
            decibels = psnr(given, reference)
            agrees.append(decibels >= ALLOWED_PSNR_DB[precision])
            # Equal pictures have no finite distance, and JSON has no infinity.
            distances[f"{part}_psnr_db"] = round(decibels, 1) if np.isfinite(decibels) else None
        else:
            error = relative_error(given, reference)
            agrees.append(error <= ALLOWED_ERROR[precision])
            distances[f"{part}_relative_error"] = float(f"{error:.2g}")
    return {**distances, "agrees": all(agrees) if agrees else None}


def available_bytes() -> int:
    """Return the memory that processes could take now; a large number where nobody tells."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62
