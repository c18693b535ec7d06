"""How long do a request and its parts take, beside what others take for the same?

Every contender computes the same on the same weights, seed and inputs, in a process of its own that
stays open while memory allows. One round measures each contender once, so that a machine that slows
down slows all of them; the peak of a matrix product is measured in every round too. What a
contender gives is compared with ONNX Runtime's float32.

With --out the file is written after every measurement, and a second call goes on where the first
ended; what failed or could not be opened is tried again.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.contenders import CONTENDERS, PEAK, contenders
from benchmarks.flops import request_flops
from benchmarks.race import WARM_UPS, Race
from benchmarks.resumable import begin, fill, keep
from benchmarks.rounds import PEAKS, summarised
from benchmarks.scenarios import PARTS, WHOLE, Scenario
from engine.backends.settings import cpu_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a benchmark is run.

    only: texts of which a contender's name holds one; none means all that are ready soon enough
    whole: whether the whole request is run; its time is a sum of its parts' otherwise
    """

    scenario: Scenario
    repeats: int
    threads: int
    only: Sequence[str]
    whole: bool

    @classmethod
    def of(cls, model: str, *, whole: bool, threads: int | None, **options: Any) -> Self:
        """Fill in the defaults of a model; raises RequestError for a model that is not known."""
        scenario = Scenario.of(model)
        runs_whole = whole or scenario.runs_whole
        return cls(scenario=scenario, whole=runs_whole, threads=threads or cpu_count(), **options)

    def parts(self, contender: str) -> tuple[str, ...]:
        """Return what is measured of a contender that can do it."""
        if contender == PEAK:
            return tuple(name for names in PEAKS.values() for name in names)
        if CONTENDERS[contender].saves:
            return (WHOLE,)
        return (*PARTS, *self.scenario.wholes) if self.whole else PARTS

    def contenders(self) -> list[str]:
        """Return the names of those measured, in turn; raises RequestError when there are none."""
        names = contenders(self.scenario, self.only)
        if not self.whole or self.scenario.runs_whole:
            names = [name for name in names if not CONTENDERS[name].whole_only]
        return [PEAK, *names]

    def request(self) -> dict[str, Any]:
        """Say what is measured: figures of another request are not mixed with these."""
        scenario = self.scenario
        return {
            "name": scenario.name,
            "model": scenario.title,
            "prompt": scenario.prompt,
            "size": scenario.size,
            "steps": scenario.steps,
            **({"more_steps": scenario.more_steps} if scenario.more_steps else {}),
            "guidance_scale": scenario.guidance_scale,
            "threads": self.threads,
            "warm_ups": WARM_UPS,
            "whole_is_a_sum": not self.whole,
        }


def measure(choice: Choice, out: Path | None = None) -> dict[str, Any]:
    """Measure until every contender has its rounds; raises OutputError, RequestError."""
    names = choice.contenders()
    report = begin(
        choice.request(), out, lambda: {"flops": request_flops(choice.scenario), "contenders": {}}
    )
    taken = report["contenders"]
    with tempfile.TemporaryDirectory() as folder:
        race = Race(choice.scenario, choice.threads, choice.parts, Path(folder))
        try:
            fill(
                taken,
                names,
                choice.repeats,
                lambda name: _take(race, name, taken[name]),
                lambda: keep(summarised(report), out),
            )
        finally:
            race.close()
    return summarised(report)


def _take(race: Race, name: str, taken: dict[str, Any]) -> dict[str, float]:
    """Measure a contender once; returns seconds by part; raises ContenderError."""
    try:
        return race.take(name, taken)
    finally:
        race.make_room(name)
