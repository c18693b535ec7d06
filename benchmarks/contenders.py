"""What is compared: each contender opens a model and gives a function for each part.

A part's function takes nothing, computes what `benchmarks.scenarios` says on the scenario's inputs,
and returns float32 numbers or the bytes of a picture. Libraries are imported where one is opened.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.control_nets import own_parts
from benchmarks.peers import cpp_parts, diffusers_parts, optimum_parts
from benchmarks.scenarios import ENGINES, MADE, SEED, Parts, Scenario, engine_inputs
from engine.backends.openvino.int8 import find_ranges
from engine.backends.settings import PRECISIONS, BackendSettings
from engine.engines import ranges_of
from engine.errors import BackendError, RequestError
from engine.graphs.graph import Part, graph_folders
from engine.model import Model

if TYPE_CHECKING:
    from runtime import Pipeline

PEAK_SIDE = 2000  # of the square matrices whose product is the machine's peak
REFERENCE = "latentrt, ONNX Runtime float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to run a model.

    open: makes it ready for a scenario on that many threads; raises whatever its library raises
    precision: what it computes in; settings: how it was set up, for the report
    quick: whether it is ready soon enough for the model that ships
    modules: what it imports, so that their memory is told from the model's
    whole_only: it draws requests of Stable Diffusion, with a sampler of its own, and no parts; its
        pictures are compared with nobody's
    saves: it leaves out some of the request's work, at a price; only whole requests tell of that
    draws: the scenario of the model that it runs where that is not the one measured; its outputs
        are compared with nobody's
    """

    open: Callable[[Scenario, int], Parts]
    precision: str
    settings: str
    quick: bool = True
    modules: tuple[str, ...] = ()
    whole_only: bool = False
    saves: bool = False
    draws: str = ""


def _ours(
    precision: str, backend: str, options: Mapping[str, Any], scenario: Scenario, threads: int
) -> Parts:
    if precision == "int8":
        calibrate(scenario)
    settings = BackendSettings(backend=backend, threads=threads)
    pipeline = load_pipeline(scenario, precision, settings)
    return pipeline_parts(pipeline, scenario, options)


def load_pipeline(scenario: Scenario, precision: str, settings: BackendSettings) -> "Pipeline":
    """Load a scenario's model in the project's own pipeline."""
    from runtime import Pipeline

    return Pipeline.load(
        scenario.model(),
        precision=precision,  # type: ignore[arg-type]
        settings=settings,
    )


def pipeline_parts(pipeline: "Pipeline", scenario: Scenario, options: Mapping[str, Any]) -> Parts:
    """Return the parts of the project's own pipeline; options: of a whole request."""
    inputs = engine_inputs(scenario, pipeline.model)

    def whole(steps: int = scenario.steps) -> NDArray[Any]:
        pipeline.encoder = pipeline.encoder.without_cache()  # the text is encoded each time
        given = {**scenario.options(), "num_inference_steps": steps, **options}
        drawn = pipeline(scenario.prompt, sampler="ddim", seed=SEED, **given)
        return np.stack([np.asarray(image) for image in drawn.images])

    def text() -> NDArray[Any]:
        states = [
            pipeline.engine(part).run(inputs[part])[pipeline.model.family.context]
            for part in pipeline.model.text_encoders
        ]
        return np.concatenate(states, axis=-1)

    def opened(part: Part) -> NDArray[Any]:
        pipeline.engine(part)
        return np.empty(0)

    return {
        **{f"open {name}": partial(opened, part) for name, part in ENGINES.items()},
        "text": text,
        "step": lambda: pipeline.engine("step").run(inputs["step"])["next_registers"][:, 0],
        "decode": lambda: pipeline.engine("vae_decoder").run(inputs["vae_decoder"])["pixels"],
        **{name: partial(whole, steps) for name, steps in scenario.wholes.items()},
        **own_parts(pipeline, scenario),
    }


def calibrate(scenario: Scenario) -> None:
    """Find the ranges that int8 needs, unless they are known, in a process of its own.

    Raises BackendError when they were not found.
    """
    model = Model.open(scenario.model())
    if any(find_ranges(name, graph_folders()) is None for name in ranges_of(model).values()):
        command = [sys.executable, "-m", "runtime.calibration", str(scenario.model())]
        # Random weights are as random at each step and for each prompt.
        few = ["--precision", "bfloat16", "--steps", "2", "--prompt", scenario.prompt]
        command += few if scenario.name in MADE else ()
        if subprocess.run(command, stdout=sys.stderr).returncode:  # it has said why
            raise BackendError("int8's ranges were not found; see the line above")


def _peak(scenario: Scenario, threads: int) -> Parts:
    """Multiply matrices: in float32 by two libraries, in bfloat16 and in int8."""
    matrix = np.random.default_rng(SEED).random((PEAK_SIDE, PEAK_SIDE), np.float32)
    parts: dict[str, Callable[[], NDArray[Any]]] = {"float32": lambda: matrix @ matrix}
    try:
        import torch
    except ImportError:
        return parts
    torch.set_num_threads(threads)
    wide = torch.from_numpy(matrix)
    narrow, bytes_ = wide.bfloat16(), (127 * wide).to(torch.int8)
    return {
        **parts,
        "float32 of torch": lambda: (wide @ wide)[:1].numpy(),
        "bfloat16": lambda: (narrow @ narrow)[:1].float().numpy(),
        "int8": lambda: torch._int_mm(bytes_, bytes_)[:1].numpy(),
    }


_EAGER = "channels_last, torch.inference_mode, attention by scaled_dot_product_attention"
_COMPILED = f"{_EAGER}, UNet and decoder by torch.compile(fullgraph=True), inductor's freezing"
_OPENVINO = "INFERENCE_PRECISION_HINT={}, PERFORMANCE_HINT=LATENCY, static shapes{}"
_HYBRID = ', OVWeightQuantizationConfig(bits=8, quant_method="hybrid")'
_CPP = "wtype f32, flash attention; a sampler of its own, so its pictures are not compared"
_DIFFUSERS = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
_LIBRARIES = {"cpu": ("ONNX Runtime", "onnxruntime"), "openvino": ("OpenVINO", "openvino")}
# Precisions that no kernel of the library computes in: it widens and narrows around every node.
EMULATED = (("cpu", "float16"),)


def _own(backend: str, precision: str) -> tuple[str, Contender]:
    title, library = _LIBRARIES[backend]
    plain = (backend, precision) == ("cpu", "float32")
    choice = "" if plain else f'precision="{precision}", '
    return f"latentrt, {title} {precision}", Contender(
        open=partial(_ours, precision, backend, {}),
        precision=precision,
        settings=f'{choice}BackendSettings(backend="{backend}")',
        modules=("runtime", library),
    )


def _another(draws: str, contender: Contender) -> Contender:
    """Return a contender that runs another model than the one measured."""

    def opened(scenario: Scenario, threads: int) -> Parts:
        return contender.open(Scenario.of(draws), threads)

    title = Scenario.of(draws).title
    return replace(contender, open=opened, draws=draws, settings=f"{contender.settings}; {title}")


_SAME_MODEL: Mapping[str, Contender] = {
    **dict(
        _own(backend, precision)
        for backend in _LIBRARIES
        for precision in PRECISIONS[backend]
        if (backend, precision) not in EMULATED
    ),
    **{
        f"latentrt, OpenVINO {precision}, cache_interval={interval}": Contender(
            open=partial(_ours, precision, "openvino", {"cache_interval": interval}),
            precision=precision,
            settings=f'precision="{precision}", cache_interval={interval}: see the table of '
            "quality for what it costs",
            modules=("runtime", "openvino"),
            saves=True,
        )
        for precision, interval in (("bfloat16", 3), ("int8", 3), ("int8", 4))
    },
    **{
        f"diffusers, {way} {precision}": Contender(
            open=partial(diffusers_parts, precision, way == "torch.compile"),
            precision=precision,
            settings=_COMPILED if way == "torch.compile" else _EAGER,
            quick=way != "torch.compile",
            modules=(_DIFFUSERS,),
        )
        for way in ("eager", "torch.compile")
        for precision in ("float32", "bfloat16")
    },
    **{
        f"optimum-intel, OpenVINO {precision}": Contender(
            open=partial(optimum_parts, "openvino", precision),
            precision=precision,
            settings=_OPENVINO.format(*hints),
            modules=("optimum.intel.openvino.modeling_diffusion",),
            quick=False,
        )
        for precision, hints in (
            ("float32", ("f32", "")),
            ("bfloat16", ("bf16", "")),
            ("int8", ("bf16", _HYBRID)),
        )
    },
    "optimum, ONNX Runtime float32": Contender(
        open=partial(optimum_parts, "onnxruntime", "float32"),
        precision="float32",
        settings="ORTStableDiffusionPipeline, the library's own session options",
        modules=("optimum.onnxruntime.modeling_diffusion",),
        quick=False,
    ),
    "stable-diffusion.cpp float32": Contender(
        open=cpp_parts,
        precision="float32",
        settings=_CPP,
        quick=False,
        modules=("stable_diffusion_cpp",),
        whole_only=True,
    ),
}
# What is measured beside a tiny decoder, in the precision that is compared there.
FULL = "full decoder"
_OTHER_MODELS = {FULL: "sdturbo_full", "SDXS": "sdxs"}
_WITH_OTHERS = ("latentrt, OpenVINO", "diffusers, eager", "optimum-intel, OpenVINO")
CONTENDERS: Mapping[str, Contender] = {
    **_SAME_MODEL,
    **{
        f"{name} bfloat16, {title}": _another(draws, _SAME_MODEL[f"{name} bfloat16"])
        for title, draws in _OTHER_MODELS.items()
        for name in _WITH_OTHERS
    },
}
# Measured in each round like the contenders: what the machine can do at that time.
PEAK = "the machine's peak"
MEASURED: Mapping[str, Contender] = {
    PEAK: Contender(open=_peak, precision="", settings=f"product of {PEAK_SIDE} x {PEAK_SIDE}"),
    **CONTENDERS,
}


def contenders(scenario: Scenario, only: Sequence[str]) -> list[str]:
    """Return the names that hold one of these texts, or of all that are ready soon enough.

    Raises RequestError when there are none.
    """
    chosen = [
        name
        for name, contender in CONTENDERS.items()
        if _can_draw(contender, scenario)
        and (any(text in name for text in only) if only else _is_usual(contender, scenario))
    ]
    if not chosen:
        raise RequestError(
            f"no contender is called {' or '.join(only)}; there are {'; '.join(CONTENDERS)}"
        )
    return chosen


def _can_draw(contender: Contender, scenario: Scenario) -> bool:
    if contender.saves and scenario.steps == 1:  # there is no step before
        return False
    return not contender.draws or contender.draws in scenario.beside


def _is_usual(contender: Contender, scenario: Scenario) -> bool:
    """Tell whether a contender is measured where nobody chooses."""
    compared = not scenario.precisions or contender.precision in scenario.precisions
    return compared and (contender.quick or scenario.name != "pictogram")
