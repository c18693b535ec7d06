"""What does one graphics card do? Sections of a minute or two, each one JSON object.

    python -m benchmarks card --out gpu-CARD.json --seconds 300

A section that has not its seconds left is left for the next call, which goes on with the file;
what failed or was skipped is tried again. With --dry every section runs in its smallest form, on
any backend, so that a script's mistakes are found without a card.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import load_pipeline
from benchmarks.distances import relative_error
from benchmarks.gpu_contenders import queued
from benchmarks.resumable import begin, keep, named
from benchmarks.sanitizer import find_tool, sanitizer_figures
from benchmarks.scenarios import QUEUED, SEED, Scenario, engine_inputs
from benchmarks.torch_step import kernel_times, torch_figures
from engine.backends.base import DeviceEngine
from engine.backends.settings import BackendSettings
from engine.errors import LatentrtError, RequestError
from runtime import Pipeline
from runtime.images.files import psnr

WEBGPU, CUDA = "webgpu", "cuda"
STEPS = 50
UNMEASURED = {"failed", "skipped"}  # what a section says that is to be tried again
SANITIZER_S = 100  # of compute-sanitizer, under which kernels take many times as long
Case = TypeVar("Case")
Load = Callable[[Scenario, str, BackendSettings], Pipeline]
"""Loads a scenario's model in a precision on a backend."""


class NotMeasuredError(Exception):
    """A section cannot be measured on this machine; its text says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is measured, and how.

    backend: of the card; dry: the smallest form of everything
    load: opens a pipeline; repeats: of everything that is timed
    """

    backend: str
    dry: bool = False
    load: Load = load_pipeline
    repeats: int = 5

    def scenario(self, name: str, batch: int = 1, steps: int = STEPS) -> Scenario:
        """Return a scenario, such as "sd15-512"; a dry one is the model that ships at 64 pixels."""
        if self.dry:
            return replace(Scenario.of(f"pictogram-64-x{min(batch, 2)}"), steps=2)
        return replace(Scenario.of(f"{name}-x{batch}"), steps=steps)

    def some(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Return the cases of a section; of a dry one the first alone."""
        return cases[:1] if self.dry else cases

    def open(self, scenario: Scenario, backend: str | None = None) -> Pipeline:
        """Open a pipeline on the card in float16, dry in float32, or on the processor."""
        precision = "float32" if backend == "cpu" or self.dry else "float16"
        return self.load(scenario, precision, BackendSettings(backend=backend or self.backend))

    def seconds(self, work: Callable[[], object]) -> dict[str, float]:
        """Time something that has been done once; the median and the spread, in milliseconds."""
        work()
        taken = []
        for _ in range(1 if self.dry else self.repeats):
            began = time.perf_counter()
            work()
            taken.append(1e3 * (time.perf_counter() - began))
        return {"ms": statistics.median(taken), "spread_ms": max(taken) - min(taken)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report; seconds: that it may take on a card."""

    seconds: float
    measure: Callable[[Card], Mapping[str, Any]] = field(repr=False)


def _parts(card: Card) -> dict[str, Any]:
    """Compare every part with the processor's in float32."""
    names = card.some(("pictogram-128", "sd15-512"))
    return {name: _errors(card, card.scenario(name)) for name in names}


def _errors(card: Card, scenario: Scenario) -> dict[str, Any]:
    ours, host = card.open(scenario), card.open(scenario, "cpu")
    found: dict[str, Any] = {}
    for part, inputs in engine_inputs(scenario, ours.model).items():
        began = time.perf_counter()
        actual = ours.engine(part).run(inputs)
        first = time.perf_counter() - began
        expected = host.engine(part).run(inputs)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        found[part] = {"first_run_s": first, "relative_errors": errors}
    ours.close()
    host.close()
    return found


def _pictures(card: Card) -> dict[str, Any]:
    """Draw whole pictures, the first call by call, and compare them with the processor's."""
    found = {}
    for name, steps in card.some((("pictogram-128", 20), ("sd15-512", 4))):
        scenario = card.scenario(name, steps=steps)
        ours, host = card.open(scenario), card.open(scenario, "cpu")
        expected = _draw(host, scenario)
        pictures = []
        for _ in range(3):  # call by call, recorded, launched again
            began = time.perf_counter()
            drawn = _draw(ours, scenario)
            took = time.perf_counter() - began
            pictures.append({"s": took, "psnr_db": _psnr_db(drawn, expected)})
        engine = ours.engine("step")
        records = engine.records if isinstance(engine, DeviceEngine) else False
        found[name] = {"steps": scenario.steps, "pictures": pictures, "records": records}
        ours.close()
        host.close()
    return found


def _draw(pipeline: Pipeline, scenario: Scenario) -> NDArray[np.uint8]:
    options = scenario.options()
    drawn = pipeline(scenario.prompt, sampler="ddim", seed=SEED, **options).images
    return np.stack([np.asarray(picture) for picture in drawn])


def _psnr_db(drawn: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float | None:
    """Return the PSNR of pictures in dB, None where they are equal."""
    return None if np.array_equal(drawn, expected) else psnr(drawn, expected)


def _request(card: Card) -> dict[str, Any]:
    """Time the steps of one guided picture of Stable Diffusion 1.5, and all of it."""
    scenario = card.scenario("sd15-512")
    pipeline = card.open(scenario)
    found = {"steps": scenario.steps, "whole": card.seconds(lambda: _draw(pipeline, scenario))}
    found["queued_step"] = _queued(card, pipeline, scenario)
    pipeline.close()
    return found


def _queued(card: Card, pipeline: Pipeline, scenario: Scenario) -> dict[str, float]:
    """Time a step among several that are queued in a row, in milliseconds."""
    taken = card.seconds(_steps(pipeline, scenario))
    return {name: value / QUEUED for name, value in taken.items()}


def _steps(pipeline: Pipeline, scenario: Scenario) -> Callable[[], object]:
    """Return what queues several steps and waits for the last."""
    engine = pipeline.engine("step")
    if not isinstance(engine, DeviceEngine):
        raise RequestError("the backend has no device; choose one of a GPU")
    return queued(engine, engine_inputs(scenario, pipeline.model)["step"])


def _profile(card: Card) -> dict[str, Any]:
    """Find the heaviest kernels of several steps."""
    scenario = card.scenario("sd15-512")
    pipeline = card.open(scenario)
    found = kernel_times(_steps(pipeline, scenario), dry=card.dry)
    pipeline.close()
    return {"steps": QUEUED, **found}


def _batches(card: Card) -> dict[str, Any]:
    """Time a step of several pictures at once."""
    found = {}
    pipeline = card.open(card.scenario("sd15-512"))
    for batch in (1, 2) if card.dry else (1, 2, 4, 8, 16):
        found[str(batch)] = _queued(card, pipeline, card.scenario("sd15-512", batch))
    pipeline.close()
    return found


def _sizes(card: Card) -> dict[str, Any]:
    """Draw other sizes and models."""
    found = {}
    cases = (("sd15-512", 4), ("sd15-768", 1), ("sd21-768", 1), ("xl-1024", 1))
    for name, batch in card.some(cases):
        scenario = card.scenario(name, batch, steps=20)
        pipeline = card.open(scenario)
        whole = card.seconds(lambda p=pipeline, s=scenario: _draw(p, s))  # type: ignore[misc]
        found[f"{name}-x{batch}"] = {"steps": scenario.steps, "whole": whole}
        pipeline.close()
    return found


def _settings(card: Card) -> dict[str, Any]:
    """Leave the settings of the backend `cuda` out, one at a time."""
    if card.backend != CUDA:
        raise NotMeasuredError(f"the settings are those of the backend {CUDA}")
    from benchmarks.card_settings import settings_figures

    scenario = card.scenario("sd15-512")
    pipeline = card.open(scenario)
    engine, model = pipeline.engine("step"), pipeline.model
    if not isinstance(engine, DeviceEngine):
        raise RequestError("the backend has no device; choose one of a GPU")
    device, graph = engine.device, pipeline.engines.graph("step")
    inputs = engine_inputs(scenario, model)["step"]
    pipeline.close()
    del engine
    gc.collect()  # its memory is told from that of the sessions to come
    return settings_figures(graph, model.weights("step"), device, inputs, card.seconds)


def _sanitizer(card: Card) -> dict[str, Any]:
    """Draw the model that ships under compute-sanitizer; dry by itself, on the processor."""
    if card.backend == WEBGPU:
        raise NotMeasuredError("compute-sanitizer sees CUDA's kernels, and WebGPU has none")
    tool = find_tool()
    if card.dry:
        return sanitizer_figures(tool=None, backend="cpu", seconds=SANITIZER_S)
    if tool is None:
        raise NotMeasuredError(
            "compute-sanitizer is neither on the path nor in CUDA's folder; install NVIDIA's CUDA "
            "toolkit, or set CUDA_HOME"
        )
    return sanitizer_figures(tool, card.backend, SANITIZER_S)


def _webgpu(card: Card) -> dict[str, Any]:
    """Do the first sections for the model that ships through WebGPU."""
    if sys.platform == "linux" and find_library("vulkan") is None and not card.dry:
        raise NotMeasuredError(
            "WebGPU wants Vulkan, whose library is not on this machine; install libvulkan1"
        )
    other = card if card.dry else replace(card, backend=WEBGPU)
    scenario = card.scenario("pictogram-128", steps=20)
    pipeline, host = other.open(scenario), card.open(scenario, "cpu")
    expected, drawn = (_draw(each, scenario) for each in (host, pipeline))
    return {
        "parts": _errors(other, scenario),
        "psnr_db": _psnr_db(drawn, expected),
        "whole": card.seconds(lambda: _draw(pipeline, scenario)),
    }


SECTIONS: Mapping[str, Section] = {
    "parts": Section(seconds=50, measure=_parts),
    "pictures": Section(seconds=60, measure=_pictures),
    "request": Section(seconds=30, measure=_request),
    "torch": Section(seconds=40, measure=lambda card: torch_figures(card.dry, compiled=False)),
    "batches": Section(seconds=40, measure=_batches),
    "compiled": Section(seconds=120, measure=lambda card: torch_figures(card.dry, compiled=True)),
    "sizes": Section(seconds=120, measure=_sizes),
    "profile": Section(seconds=40, measure=_profile),
    "settings": Section(seconds=120, measure=_settings),
    "sanitizer": Section(seconds=SANITIZER_S, measure=_sanitizer),
    "webgpu": Section(seconds=60, measure=_webgpu),
}


def measure(
    card: Card,
    *,
    only: Sequence[str] = (),
    seconds: float | None = None,
    out: Path | None = None,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the sections that a file lacks, and print each as a line of JSON.

    only: texts of which a section's name holds one, none means all; seconds: for all of them
    Raises OutputError where the file is of something else, RequestError.
    """
    until = float("inf") if seconds is None else time.monotonic() + seconds
    names = named("section", SECTIONS, only)
    asked = {"name": "card", "backend": card.backend, "dry": card.dry}
    report = begin(asked, out, lambda: {"sections": {}})
    for name in names:
        if UNMEASURED & report["sections"].get(name, dict.fromkeys(UNMEASURED)).keys():
            section = SECTIONS[name]
            if until - time.monotonic() < section.seconds and not card.dry:
                show(json.dumps({"section": name, "left": f"{section.seconds:.0f} s are wanted"}))
                continue
            report["sections"][name] = _measured(card, section)
            keep(report, out)
        show(json.dumps({"section": name, **report["sections"][name]}))
    return report


def failed(report: Mapping[str, Any]) -> list[str]:
    """Return the sections of a report that failed."""
    return [name for name, found in report["sections"].items() if "failed" in found]


def _measured(card: Card, section: Section) -> dict[str, Any]:
    began = time.monotonic()
    try:
        found = dict(section.measure(card))
    except NotMeasuredError as reason:
        found = {"skipped": str(reason)}
    except (LatentrtError, ImportError, RuntimeError) as failure:  # torch's are the last
        found = {"failed": str(failure).splitlines()[0][:300] if str(failure) else repr(failure)}
    return {**found, "took_s": time.monotonic() - began}
