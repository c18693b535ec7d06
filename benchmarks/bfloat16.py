"""What does it bring to keep some operations of a UNet in float32 where the rest is bfloat16?

Each case is the error of a guided step beside float32's, the step's time, and with the model that
ships whole pictures beside float32's. The cases are opened one after the other in this process.
What a case keeps is marked in the library's own form of the model, which has an attribute for it.
"""

import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import load_pipeline
from benchmarks.distances import relative_error
from benchmarks.machine import summary
from benchmarks.quality import GUIDANCE_SCALE, LARGEST_DB, PROMPTS, SEED, STEPS
from benchmarks.resumable import begin, keep, named
from benchmarks.scenarios import Scenario, engine_inputs
from engine.backends.openvino import engine as openvino_engine
from engine.backends.openvino.float32_ends import keep_products, keep_waves
from engine.backends.openvino.gates import part_gates
from engine.backends.settings import BackendSettings, cpu_count
from engine.graphs.graph import find_graph, graph_folders
from runtime import Pipeline
from runtime.images.files import psnr

PICTURES = 8
LAYERS = ("Convolution", "MatMul", "ScaledDotProductAttention")
WITHOUT = ("Parameter", "Constant", "Result")  # that compute nothing
# The attribute of an operation by which the library leaves it as it is.
ATTRIBUTE = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What stays in float32.

    waves: of the timestep; sampler: with guidance; kinds: operators by the library's names
    others: all operators but these, where there are any; tiles: whether convolutions are computed
    in them
    """

    waves: bool = True
    sampler: bool = True
    kinds: Sequence[str] = ()
    others: Sequence[str] = ()
    tiles: bool = True

    def keeps(self, kind: str) -> bool:
        """Tell whether operators of a kind are to be left in float32."""
        if kind in WITHOUT:
            return False
        return kind in self.kinds or bool(self.others and kind not in self.others)


DEFAULT = "the timestep's waves, guidance and the sampler"
CASES = {
    "nothing": Case(waves=False, sampler=False),
    "the timestep's waves": Case(sampler=False),
    "guidance and the sampler": Case(waves=False),
    DEFAULT: Case(),
    "these and layer norms": Case(kinds=("MVN",)),
    "these and sums, residuals among them": Case(kinds=("Add",)),
    "these, SiLU and the gates": Case(kinds=("Sigmoid", "Swish", "Gelu", "Multiply")),
    "all but convolutions, products and attention": Case(others=LAYERS),
    "all but these, and no tiles": Case(others=LAYERS, tiles=False),
    "the default, and no tiles": Case(tiles=False),
}


class _KeepingEngine(openvino_engine.OpenVinoEngine):
    """A step in bfloat16 with a case's operations in float32."""

    case: Case = CASES[DEFAULT]

    def _read(self) -> Any:
        model = super()._read()
        kept = {
            op.get_friendly_name()
            for op in model.get_ordered_ops()
            if self.case.keeps(op.get_type_name())
        }
        return self._marked(model, kept) if kept else model

    def _marked(self, model: Any, names: set[str]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            description, numbers = Path(folder, "model.xml"), Path(folder, "model.bin")
            self._library.serialize(model, description, numbers)
            tree = ElementTree.parse(description)  # written by the library just now
            for layer in tree.iter("layer"):
                if layer.get("name") in names:
                    info = layer.find("rt_info")
                    if info is None:
                        info = ElementTree.Element("rt_info")
                        layer.insert(1 if layer.find("data") is not None else 0, info)
                    ElementTree.SubElement(info, "attribute", ATTRIBUTE)
            tree.write(description)
            return self._core.read_model(description.read_bytes(), numbers.read_bytes())

    def _prepare(self, model: Any) -> None:
        part_gates(self._library, model)
        if self.case.sampler:
            keep_products(self._library, model, self._graph.weights)
        if self.case.waves:
            keep_waves(self._library, model)

    def _transform(self, model: Any) -> None:
        if self.case.tiles:
            super()._transform(model)


def measure(
    model: str = "pictogram",
    repeats: int = 5,
    threads: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the cases that a file lacks; raises BackendError, OutputError, RequestError.

    only: texts of which a case's name holds one, none means all
    """
    scenario, threads = Scenario.of(model), threads or cpu_count()
    names = named("case", CASES, only)
    asked = {"name": "bfloat16", "model": scenario.title, "size": scenario.size}
    asked |= {"threads": threads, "repeats": repeats, "guidance_scale": scenario.guidance_scale}
    report = begin(asked, out, lambda: {"cases": {}})
    missing = [name for name in names if name not in report["cases"]]
    if missing:
        stage = _Stage(scenario, threads, repeats)
        for name in missing:
            report["cases"][name] = stage.measure(CASES[name])
            keep(report, out)
    return report


class _Stage:
    """A scenario's model, and what float32 makes of it."""

    def __init__(self, scenario: Scenario, threads: int, repeats: int) -> None:
        self._repeats = repeats
        self._settings = BackendSettings(backend="openvino", threads=threads)
        self._pipeline = load_pipeline(scenario, "bfloat16", self._settings)
        self._inputs = engine_inputs(scenario, self._pipeline.model)["step"]
        self._draws = scenario.name == "pictogram"
        exact = load_pipeline(scenario, "float32", self._settings)
        self._expected = exact.engine("step").run(self._inputs)["next_registers"]
        self._pictures = _drawn(exact) if self._draws else []
        exact.close()

    def measure(self, case: Case) -> dict[str, Any]:
        pipeline, model = self._pipeline, self._pipeline.model
        pipeline.engines.opened.pop("step", None)  # before the next takes its memory
        graph = find_graph("step", model.unet, "float32", graph_folders(), model.path)
        engine = type("_Case", (_KeepingEngine,), {"case": case})(
            graph, model.weights("step"), self._settings.threads, "bfloat16"
        )
        pipeline.engines.opened["step"] = engine
        found = engine.run(self._inputs)["next_registers"]
        seconds = [_seconds(lambda: engine.run(self._inputs)) for _ in range(self._repeats + 1)]
        measured = {
            "relative_error": float(f"{relative_error(found, self._expected):.4g}"),
            "seconds": summary(seconds[1:]),
        }
        if self._draws:
            pairs = zip(_drawn(pipeline), self._pictures, strict=True)
            measured["psnr_db"] = summary([min(psnr(a, b), LARGEST_DB) for a, b in pairs])
        return measured


def _drawn(pipeline: Pipeline) -> list[NDArray[np.uint8]]:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    return [
        np.asarray(pipeline(prompt, seed=SEED + i, sampler="ddim", **options).images[0])
        for i, prompt in enumerate(PROMPTS[:PICTURES])
    ]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
