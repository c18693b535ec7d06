"""What does serving gain and cost?

Step times are the cost of a step by its rows. Load is the model that ships under requests that come
by chance, with each way to choose what is drawn next. Simulation is the same with the cost curves
of other machines. Costs are those of HTTP and of the start; memory is whether it stays flat.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.resumable import begin, keep
from benchmarks.serving import costs, kept_memory, load, simulation, step_times
from engine.errors import RequestError

STEP_TIMES, LOAD, SIMULATION, COSTS, MEMORY = PARTS = (
    *("step times", "load", "simulation", "costs", "memory"),
)
REQUESTS = 90
ARRIVALS = 500
MEMORY_REQUESTS = 10_000
LOADS = 0.9, 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is measured, and how much of it.

    parts: of PARTS; loads: of the capacity of one at a time; requests: of a run of load;
    arrivals: of a simulated run; memory: requests to an engine that draws nothing
    """

    drawing: load.Drawing
    parts: Sequence[str] = PARTS
    loads: Sequence[float] = LOADS
    requests: int = REQUESTS
    arrivals: int = ARRIVALS
    memory: int = MEMORY_REQUESTS

    def __post_init__(self) -> None:
        """Refuse what cannot be measured. Raises RequestError."""
        if not self.parts:
            raise RequestError(f"no part is called that; there are {', '.join(PARTS)}")
        numbers = {"rows": self.drawing.rows, "threads": self.drawing.threads}
        numbers |= {n: getattr(self, n) for n in ("requests", "arrivals", "memory")}
        for name, number in numbers.items():
            if number < 1:
                raise RequestError(f"--{name} is {number}; give 1 or more")
        if not all(0 < given < float("inf") for given in self.loads) or not self.loads:
            raise RequestError("--loads are shares of a capacity, such as 0.9,1.2")


def measure(choice: Choice, out: Path | None = None) -> dict[str, Any]:
    """Measure the chosen parts, each written when it is done; what the file holds of others stays.

    Raises OutputError, RequestError or BackendError.
    """
    report = begin({"model": load.MODEL}, out, dict)
    if SIMULATION in choice.parts and not {STEP_TIMES} & {*choice.parts, *report}:
        raise RequestError(f"{SIMULATION} takes the curve of {STEP_TIMES}; measure that before")
    for part in PARTS:
        if part in choice.parts:
            report[part] = MEASURES[part](choice, report)
            keep(report, out)
    return report


def _simulated(choice: Choice, report: Mapping[str, Any]) -> dict[str, Any]:
    times = report[STEP_TIMES]["step_s"].items()
    curve = {int(rows): found["median"] for rows, found in times}
    decode = report[STEP_TIMES]["decode_s"]["median"] / curve[1]
    return simulation.measure(curve, decode, choice.drawing.rows, choice.loads, choice.arrivals)


MEASURES: Mapping[str, Callable[[Choice, Mapping[str, Any]], dict[str, Any]]] = {
    STEP_TIMES: lambda choice, report: step_times.measure(choice.drawing),
    LOAD: lambda choice, report: load.measure(choice.drawing, choice.loads, choice.requests),
    SIMULATION: _simulated,
    COSTS: lambda choice, report: costs.measure(choice.drawing.threads),
    MEMORY: lambda choice, report: kept_memory.measure(choice.memory),
}
