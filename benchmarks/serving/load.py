"""The model that ships under open-loop load, each contender in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.machine import memory
from benchmarks.serving.contenders import ALONE, CONTENDERS
from benchmarks.serving.driving import ProcessorClock, Seen, by_hand, in_threads, make_loop
from benchmarks.serving.traffic import at_once, orders, poisson
from engine.backends.settings import ComputePrecision
from serving.child import runner as make_runner
from serving.engine_settings import EngineSettings

MODEL = "pictogram"
MEASURED_MIXES = ("mixed", "equal")
CLOCKS = ("wall", "processor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """With what, and how its time is taken.

    threads: of the engine; rows: in a step at most
    clock: "wall" has the server's threads; "processor" does all work in one thread and counts the
        processor's time, so that others on the machine do not matter
    """

    backend: str = "cpu"
    precision: ComputePrecision = "float32"
    threads: int = 1
    rows: int = 8
    clock: str = "wall"

    def settings(self) -> EngineSettings:
        """Return the settings of the engine."""
        return EngineSettings(
            models={MODEL: MODEL},
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
        )


def measure(drawing: Drawing, loads: Sequence[float], count: int) -> dict[str, Any]:
    """Measure every contender; loads: of the capacity of one at a time, which is measured first.

    The files that it draws then are those that all others must draw.
    """
    measured: dict[str, Any] = {"request": {**asdict(drawing), "requests": count}, "mixes": {}}
    for mix in MEASURED_MIXES:
        reference = _process(drawing, ALONE, mix, at_once(count))
        capacity = reference["figures"]["pictures_per_s"]
        wanted = reference.pop("files")
        measured["mixes"][mix] = {"capacity_per_s": capacity, "loads": {}}
        for load in loads:
            arrivals = poisson(count, load * capacity)
            told = {name: _process(drawing, name, mix, arrivals, wanted) for name in CONTENDERS}
            measured["mixes"][mix]["loads"][str(load)] = told
    return measured


def _process(
    drawing: Drawing,
    contender: str,
    mix: str,
    arrivals: Sequence[float],
    wanted: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measure in a new process; returns figures and memory, and how many files are as wanted."""
    asked = {
        "drawing": asdict(drawing),
        "contender": contender,
        "mix": mix,
        "arrivals": list(arrivals),
    }
    code = "from benchmarks.serving.load import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asked),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    if wanted is not None:
        files = told.pop("files")
        told["equal"] = sum(files[job] == wanted[job] for job in wanted)
    return told


def run() -> None:
    """Measure in this process what its input says, and print JSON."""
    asked = json.load(sys.stdin)
    drawing = Drawing(**asked["drawing"])
    wanted = orders(asked["mix"], len(asked["arrivals"]))
    runner = make_runner(drawing.settings())
    runner.warm(MODEL)
    clock = ProcessorClock() if drawing.clock == "processor" else time.perf_counter
    seen = Seen(clock=clock, arrivals=asked["arrivals"])
    loop = make_loop(asked["contender"], runner, seen, drawing.rows, clock)
    if isinstance(clock, ProcessorClock):
        by_hand(loop, seen, clock, wanted)
    else:
        in_threads(loop, seen, wanted)
    print(json.dumps({"figures": seen.figures(), "memory": memory(), "files": seen.files}))
