"""How long do a request and its parts take, beside what others take for the same?

Every contender computes the same on the same weights, seed and inputs, in a process of its own that
stays open while memory allows. One round measures each contender once, so that a machine that slows
down slows all of them; the peak of a matrix product is measured in every round too. What a
contender gives is compared with ONNX Runtime's float32.

With --out the file is written after every measurement, and a second call goes on where the first
ended; what failed or could not be opened is tried again.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from benchmarks.contenders import CONTENDERS, PEAK
from benchmarks.field import WARM_UPS, ContenderError, Field
from benchmarks.flops import count
from benchmarks.machine import describe
from benchmarks.rounds import PEAKS, summarised, total
from benchmarks.scenarios import PARTS, SCENARIOS, WHOLE, Scenario, engine_inputs
from engine.backends import processors
from engine.cache import write_atomically
from engine.errors import OutputError, RequestError
from engine.graphs import find_graph, graph_folders
from engine.model import Model

ENGINES = {"text": "text_encoder", "step": "step", "decode": "vae_decoder"}
PACKAGES = (
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "diffusers",
    "transformers",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
)


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
    def of(cls, model: str, *, whole: bool, threads: int | None, **wishes: Any) -> Self:
        """Fill in the defaults of a model; raises RequestError for a model that is not known."""
        if model not in SCENARIOS:
            raise RequestError(f"the model {model!r} is not known; choose {', '.join(SCENARIOS)}")
        scenario = SCENARIOS[model]
        runs_whole = whole or scenario.name == "pictogram"
        return cls(scenario=scenario, whole=runs_whole, threads=threads or processors(), **wishes)

    def parts(self, contender: str) -> tuple[str, ...]:
        """Return what is measured of a contender that can do it."""
        if contender == PEAK:
            return tuple(name for names in PEAKS.values() for name in names)
        return (*PARTS, WHOLE) if self.whole else PARTS

    def contenders(self) -> list[str]:
        """Return the names of those measured, in turn; raises RequestError when there are none."""
        quick = self.scenario.name == "pictogram"
        chosen = [
            name
            for name, contender in CONTENDERS.items()
            if (
                any(text in name for text in self.only)
                if self.only
                else contender.quick or not quick
            )
        ]
        if not chosen:
            raise RequestError(
                f"no contender is called {' or '.join(self.only)}; "
                f"there are {'; '.join(CONTENDERS)}"
            )
        return [PEAK, *chosen]

    def request(self) -> dict[str, Any]:
        """Say what is measured: figures of another request are not mixed with these."""
        scenario = self.scenario
        return {
            "name": scenario.name,
            "model": scenario.title,
            "prompt": scenario.prompt,
            "size": scenario.size,
            "steps": scenario.steps,
            "guidance_scale": scenario.guidance_scale,
            "threads": self.threads,
            "warm_ups": WARM_UPS,
            "whole_is_a_sum": not self.whole,
        }


def measure(choice: Choice, out: Path | None = None) -> dict[str, Any]:
    """Measure until every contender has its rounds; raises OutputError, RequestError."""
    names = choice.contenders()
    report = _begun(choice, out)
    taken = report["contenders"]
    for name in names:
        taken.setdefault(name, {"rounds": []}).pop("skipped", None)
    with tempfile.TemporaryDirectory() as folder:
        field = Field(choice.scenario, choice.threads, choice.parts, Path(folder))
        try:
            for number in range(1, choice.repeats + 1):
                for name in names:
                    if len(taken[name]["rounds"]) < number and "skipped" not in taken[name]:
                        _take(field, name, taken[name])
                        _write(out, summarised(report))
        finally:
            field.close()
    return summarised(report)


def _begun(choice: Choice, out: Path | None) -> dict[str, Any]:
    """Return the report that a former call left, or one without figures."""
    machine, request = describe(), choice.request()
    if out is not None and out.is_file():
        former: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        same = all(former["machine"][key] == machine[key] for key in ("processor", "cores"))
        if former["request"] != request or not same:
            raise OutputError(
                f"{out} holds figures of another request or machine; give another file, or "
                "delete it"
            )
        return former
    return {
        "machine": {**machine, "load_average": round(os.getloadavg()[0], 2)},
        "versions": _versions(),
        "request": request,
        "flops": _flops(choice.scenario),
        "contenders": {},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _flops(scenario: Scenario) -> dict[str, int]:
    """Count the operations of every part, and of the whole request."""
    model, counted = Model.open(scenario.model()), {}
    inputs: Any = engine_inputs(scenario, model)
    for name, part in ENGINES.items():
        config: Any = model.config(part)  # type: ignore[arg-type]
        graph = find_graph(part, config, "float32", graph_folders(), model.path)  # type: ignore[arg-type]
        shapes = {key: array.shape for key, array in inputs[part].items()}
        counted[name] = count(graph.data(), shapes)
    return {**counted, WHOLE: total(counted, scenario.steps)}


def _take(field: Field, name: str, taken: dict[str, Any]) -> None:
    """Measure a contender once, or note why that cannot be."""
    try:
        field.open(name, taken)
        seconds, peak = field.measure(name)
        taken["rounds"].append(seconds)
        taken["peak_bytes"] = max(peak, taken.get("peak_bytes", 0))
    except ContenderError as failure:
        field.drop(name)
        taken["skipped"] = str(failure)
    field.make_room(name)


def _write(out: Path | None, report: dict[str, Any]) -> None:
    if out is not None:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(out, lambda file: file.write(text.encode()))
