"""How long does a request take on an NVIDIA GPU, beside diffusers and beside the floor?

Every contender draws the same of the same weights in a process of its own, and is compared with
diffusers in float32. One round measures each once: the parts one by one, ten steps queued in a row,
and whole requests of 20 and of 50 steps. Memory is what the driver says is used during a request,
less what was used before the process began. What the GPU can do at most is measured in every round.

With --out the file is written after every measurement and a second call goes on where the first
ended, so it can be run in pieces (--minutes). What failed is tried again, after all else.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flops import request_flops
from benchmarks.gpu_contenders import (
    CEILINGS,
    COPY,
    GPU_CONTENDERS,
    GPU_MEASURED,
    GPU_PARTS,
    GPU_REFERENCE,
    PRODUCT,
    UPLOAD,
)
from benchmarks.gpu_summary import summarised
from benchmarks.nvml import Gpu, PeakMemory, find_gpu
from benchmarks.race import WARM_UPS, ContenderError, Race, available_bytes
from benchmarks.resumable import begin, fill, keep, named
from benchmarks.scenarios import LONGER_STEPS, PARTS, WHOLE, Scenario
from benchmarks.worker import Worker
from engine.backends.settings import cpu_count

SIZES = (
    ("pictogram", 128),
    ("sd15", 512),
    ("sd15", 768),
    ("sd21", 768),
    ("xl", 1024),
)
BATCHES = (1, 4)
SCENARIOS = tuple(f"{model}-{size}-x{batch}" for model, size in SIZES for batch in BATCHES)


class OutOfTimeError(Exception):
    """The minutes of a call are over; the next call goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is measured: scenarios by keys, contenders by names; until: of `time.monotonic`."""

    scenarios: Sequence[str]
    contenders: Sequence[str]
    repeats: int
    until: float

    def left(self) -> float:
        """Return the seconds that are left; raises OutOfTimeError when none are."""
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise OutOfTimeError
        return seconds


def measure(
    only: Sequence[str] = (),
    scenarios: Sequence[str] = (),
    minutes: float | None = None,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure until every contender has its rounds, or the minutes are over.

    only, scenarios: texts of which a name holds one; none means all
    Raises BackendError when there is no GPU, OutputError, RequestError.
    """
    choice = Choice(
        scenarios=named("scenario", SCENARIOS, scenarios),
        contenders=[CEILINGS, *named("contender", GPU_CONTENDERS, only)],
        repeats=repeats,
        until=time.monotonic() + 60 * minutes if minutes is not None else float("inf"),
    )
    gpu = find_gpu()
    report = begin(_request(gpu), out, lambda: {"scenarios": {}})
    with _folder(out) as folder:
        _measure(choice, gpu, report, out, folder)
    return _kept(report, choice, out)


def _request(gpu: Gpu) -> dict[str, Any]:
    """Say what is measured: figures of another request or GPU are not mixed with these."""
    return {
        "name": "gpu",
        "gpu": gpu.described(),
        "longer_steps": LONGER_STEPS,
        "warm_ups": WARM_UPS,
    }


def _measure(
    choice: Choice, gpu: Gpu, report: dict[str, Any], out: Path | None, folder: Path
) -> None:
    found = report["scenarios"]
    failed = {
        (key, name)
        for key in choice.scenarios
        for name, taken in found.get(key, {}).get("contenders", {}).items()
        if "skipped" in taken
    }
    with suppress(OutOfTimeError):
        for again in (False, True):
            for key in choice.scenarios:
                names = [name for name in choice.contenders if ((key, name) in failed) == again]
                if _unfinished(found.get(key), names, choice.repeats):
                    stage = _Stage(Scenario.of(key), gpu, choice, folder / key)
                    taken = found.setdefault(key, {"contenders": {}})
                    stage.measure(names, taken, lambda: _kept(report, choice, out))


def _unfinished(found: Any, names: Sequence[str], repeats: int) -> list[str]:
    """Return those that lack rounds."""
    taken = found["contenders"] if found else {}
    return [name for name in names if len(taken.get(name, {}).get("rounds", ())) < repeats]


def _kept(report: dict[str, Any], choice: Choice, out: Path | None) -> dict[str, Any]:
    """Sum up, and write what there is; returns it."""
    unfinished = {
        key: _unfinished(report["scenarios"].get(key), choice.contenders, choice.repeats)
        for key in choice.scenarios
    }
    report["unfinished"] = {key: names for key, names in unfinished.items() if names}
    summed = summarised(report)
    keep(summed, out)
    return summed


@dataclass(frozen=True, slots=True)
class _Stage:
    """One scenario's measurements; folder: where the reference's outputs stay."""

    scenario: Scenario
    gpu: Gpu
    choice: Choice
    folder: Path

    def measure(self, names: Sequence[str], found: dict[str, Any], written: Any) -> None:
        """Measure these contenders in turn; raises OutOfTimeError."""
        scenario, taken = self.scenario, found["contenders"]
        found |= {"title": scenario.title, "size": scenario.size, "batch": scenario.batch}
        found |= {"steps": scenario.steps, "guidance_scale": scenario.guidance_scale}
        if "flops" not in found:
            self.choice.left()
            found["flops"] = request_flops(scenario)
        expected = self._expected(found)
        with tempfile.TemporaryDirectory() as outputs:
            race = Race(
                scenario,
                cpu_count(),
                _parts,
                Path(outputs),
                contenders=GPU_MEASURED,
                expected=expected,
            )
            try:
                fill(
                    taken,
                    names,
                    self.choice.repeats,
                    lambda name: self._take(race, name, taken[name]),
                    written,
                )
            finally:
                race.close()

    def _take(self, race: Race, name: str, taken: dict[str, Any]) -> dict[str, float]:
        """Measure a contender once; returns seconds by part."""
        used = self.gpu.memory()[1]
        try:
            opened = race.open(name, taken, self.choice.left())
            if opened and name != CEILINGS:
                with PeakMemory(self.gpu) as peak:
                    race.measure(name, [WHOLE])
                taken["peak_bytes"] = max(0, peak.used - used)
            seconds, _ = race.measure(name)
        except ContenderError:
            race.drop(name)
            self.choice.left()  # what was cut short is no failure
            raise
        if min(available_bytes(), self.gpu.memory()[0]) < self.scenario.headroom_bytes:
            race.drop(name)
        return seconds

    def _expected(self, found: dict[str, Any]) -> dict[str, Path]:
        """Return the outputs of the reference; none when it cannot be run."""
        if not self.folder.is_dir():
            part = self.folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                self._run_reference(part)
            except ContenderError as failure:
                self.choice.left()
                found["reference"] = f"{GPU_REFERENCE}: {failure}"
                return {}
            part.rename(self.folder)
        found["reference"] = GPU_REFERENCE
        return {path.stem: path for path in self.folder.glob("*.npy")}

    def _run_reference(self, folder: Path) -> None:
        bound = min(self.scenario.ready_s, self.choice.left())
        worker = Worker(GPU_REFERENCE, self.scenario.key, cpu_count())
        try:
            worker.ready(bound)
            for part in (*PARTS, WHOLE):
                worker.run(part, self.choice.left(), folder / f"{part}.npy")
        finally:
            worker.close()


def _parts(contender: str) -> tuple[str, ...]:
    return (PRODUCT, COPY, UPLOAD) if contender == CEILINGS else GPU_PARTS


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Give the folder of the reference's outputs: beside the report, which is gone on with."""
    if out is not None:
        yield out.with_suffix(".expected")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
