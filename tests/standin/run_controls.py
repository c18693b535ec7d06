"""Draw with ControlNets and a T2I-Adapter of Stable Diffusion 1.5 on the stand-in; prints JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_controls.py
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.backends.base import DeviceEngine
from engine.backends.onnxruntime.cuda import OnnxRuntimeCudaEngine
from engine.checkpoints.families.sd import SD1
from engine.configs.t2i_adapter import T2IAdapterConfig, feature_sum_of
from engine.graphs.graph import Graph, Part
from engine.graphs.t2i_adapter import feature_sum_graph
from engine.graphs.variants import Variant
from runtime.control import StepControl
from runtime.denoising.controls import CallControl, ControlledSteps
from runtime.denoising.device_loop import DeviceLoop
from runtime.denoising.device_rows import DeviceRows
from runtime.denoising.latents import State
from runtime.denoising.rows import Row
from runtime.step_inputs import StepInputs
from tests.standin.call_log import CallLog, copied
from tests.standin.device import CountingDevice
from tests.standin.models import Case, cases
from tests.standin.run_pictures import counted as of_calls

SIDE, CALLS, REGISTERS = 64, 4, 2
RUNS = 4  # call by call, recorded, proven, launched
NETS = ("canny", "depth")
ADAPTER = "sketch"
ADAPTED = T2IAdapterConfig(channels=(320, 640, 1280, 1280))
RESIDUALS = 13


def opened(
    graph: Graph, device: CountingDevice, kin: Sequence[OnnxRuntimeCudaEngine] = ()
) -> OnnxRuntimeCudaEngine:
    """Open a graph with weights that are zeros."""
    weights = {name: np.zeros(shape, graph.precision) for name, shape in graph.weights.items()}
    return OnnxRuntimeCudaEngine(graph, weights, device, kin=kin)


@dataclass(slots=True, eq=False)
class Nets:
    """The nets of `engine.steering.control_nets.ControlNets` that have no files."""

    case: Case
    device: CountingDevice
    adapters: Mapping[str, T2IAdapterConfig] = field(default_factory=lambda: {ADAPTER: ADAPTED})
    engines: dict[str, DeviceEngine] = field(default_factory=dict)

    def engine(self, name: str, part: str) -> DeviceEngine:
        """Open a net's part at the first call."""
        if name not in self.engines:
            graph = self.case.graph("control")
            if part == "feature_sum":
                graph = feature_sum_graph(feature_sum_of(ADAPTED))
            self.engines[name] = opened(graph, self.device)
        return self.engines[name]


def steps_of(nets: Sequence[str], weight: float, *, is_adapted: bool) -> list[StepInputs]:
    """Return calls that nets steer, each counting otherwise."""
    context = np.zeros((2, 1, 77, 768), np.float32)
    guidance = np.ones((2, 1, 1, 1, 1), np.float32)
    counts = [len(ADAPTED.channels) if net == ADAPTER else RESIDUALS for net in nets]
    calls = []
    for call in range(CALLS):
        controls = [
            StepControl(
                net=net, place=place, weights=np.full((count, 2, 1), weight + call, np.float32)
            )
            for place, (net, count) in enumerate(zip(nets, counts, strict=True))
        ]
        calls.append(
            StepInputs(
                conditioning={"context": context, "guidance": guidance},
                per_step={
                    "matrices": np.full((1, REGISTERS, REGISTERS + 2), call, np.float32),
                    "outside": np.zeros((1, REGISTERS + 2), np.float32),
                    "timestep": np.full(1, call, np.float32),
                    "input_scale": np.ones(1, np.float32),
                },
                is_full=True,
                signal_scale=1.0,
                noise_scale=1.0,
                controls=controls,
                is_controlled=True,
                variants={"step_controlled": Variant(adapted=True)} if is_adapted else {},
            )
        )
    return calls


def main() -> None:
    """Print what pictures of a form take, one after the other, with other weights at last."""
    case, device, log = cases()["sd15-control"], CountingDevice(), CallLog()
    nets = Nets(case, device)
    controlled: Any = ControlledSteps(unet=SD1, nets=nets)  # type: ignore[arg-type]
    plain = case.graph("step_controlled")
    variant = Variant(adapted=True)
    steps = {None: opened(plain, device)}
    log.take()
    steps[variant] = opened(variant.of(plain), device, [steps[None]])
    facts: dict[str, Any] = {"uploaded by kin": sum(copied(log.take(), "HtoD"))}

    def engine(part: Part, variant: Variant | None = None) -> DeviceEngine:
        return steps[variant]

    hint = device.empty((1, SD1.block_out_channels[0], SIDE, SIDE), np.dtype(np.float32))
    features = [
        device.empty((1, width, SIDE >> level, SIDE >> level), np.dtype(np.float32))
        for width, level in ADAPTED.features()
    ]

    def state(given: Sequence[str]) -> State:
        zeros = np.zeros((1, 4, SIDE, SIDE), np.float32)
        return State(
            registers=np.zeros((1, REGISTERS, 4, SIDE, SIDE), np.float32),
            constant={
                "mask": np.ones((1, 1, SIDE, SIDE), np.float32),
                "guidance_rescale": np.zeros(1, np.float32),
            },
            noise=iter([zeros] * CALLS),
            keeps_deep=False,
            hints=[features if net == ADAPTER else [hint] for net in given],
        )

    def counted(work: Any) -> dict[str, int]:
        recorded = device.recorded
        log.take()
        work()
        calls = log.take()
        taken = sum(call[:2] == ["allocate", "cudaMalloc"] for call in calls)
        return {"recorded": device.recorded - recorded, "taken": taken, **of_calls(calls)}

    loop = DeviceLoop()
    for name, given in (("one", NETS[:1]), ("three", (*NETS, ADAPTER))):

        def draw(weight: float, given: Sequence[str] = given) -> None:
            each = steps_of(given, weight, is_adapted=ADAPTER in given)
            loop.finish(state(given), each, engine, controlled)

        facts[name] = [counted(lambda: draw(1.0)) for _ in range(RUNS)]
        facts[f"{name}, weighed otherwise"] = counted(lambda: draw(0.3))
    device_rows = DeviceRows()
    beside = [_row(net, state([net]), hint) for net in NETS]

    def step() -> None:
        device_rows.step(beside, steps[None], controlled=controlled)  # type: ignore[arg-type]

    facts["rows"] = [counted(step) for _ in range(RUNS)]
    print(json.dumps(facts))


def _row(net: str, state: State, hint: Any) -> Row:
    """Return a row that a net steers, which never ends."""

    class Steered(Row):
        def __init__(self) -> None:
            self._state, self._given, self._at, self.calls = state, None, 0, 0
            self._steps = steps_of([net], 1.0, is_adapted=False) * RUNS
            state.noise = iter([np.zeros((1, 4, SIDE, SIDE), np.float32)] * len(self._steps))

        @property
        def controls(self) -> list[CallControl]:
            (control,) = self._steps[self._at].controls
            return [CallControl(net=net, hint=[hint], weights=control.weights)]

    return Steered()


if __name__ == "__main__":
    main()
