"""Run the parts of a model on the stand-in; prints what each asked for, as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_parts.py MODEL
"""

import gc
import json
import sys
from collections import Counter

import numpy as np

from engine.backends.memory_estimate import activation_bytes, session_bytes
from engine.backends.onnxruntime.cuda import OnnxRuntimeCudaEngine
from engine.configs.base import Config
from engine.graphs.graph import Graph
from tests.standin.call_log import CallLog, arena, copied, operations
from tests.standin.device import StandInDevice
from tests.standin.models import Case, cases

RUNS = 3  # after those of `prepare`
OPENING = "cudaMemcpy"  # what a session copies with when it is opened; all else does not wait


def facts_of(
    name: str, graph: Graph, config: Config, case: Case, device: StandInDevice, log: CallLog
) -> dict[str, object]:
    """Open a part, run it, record it, and say what was asked for.

    name: of the part, as `engine.backends.memory_estimate` has it
    """
    gc.collect()  # the sessions of the part before go before this one's come
    log.take()
    weights = {name: np.zeros(shape, graph.precision) for name, shape in graph.weights.items()}
    engine = OnnxRuntimeCudaEngine(graph, weights, device)
    loaded, inputs = log.take(), case.shapes(graph)
    outputs = engine.prepare(inputs)
    dtypes = engine._form(inputs).dtypes
    placed = {name: device.empty(shape, dtypes[name]) for name, shape in inputs.items()}
    prepared = log.take()
    runs = []
    for _ in range(RUNS):
        engine.enqueue(placed, outputs)
        runs.append(log.take())
    replay = device.record(lambda: engine.enqueue(placed, outputs))
    recorded = log.take()
    replay()
    launched = log.take()
    engine.prepare(case.shapes(graph, pictures=2))  # another form, of the same weights
    other = log.take()
    assigned = engine._form(inputs).session.get_provider_graph_assignment_info()
    return {
        "elsewhere": engine._form(inputs).elsewhere,
        "operators": sorted({node.op_type for each in assigned for node in each.get_nodes()}),
        "records": engine.records,
        "arenas": [arena(prepared), arena(other)],
        "estimates": [
            session_bytes(name, activation_bytes(graph, config, case.sizes(pictures)))
            for pictures in (1, 2)
        ],
        "held": engine.held,
        "weights": sum(int(np.prod(shape)) for shape in graph.weights.values()),
        "uploaded": copied(loaded, "HtoD"),
        "constants": copied(prepared, "HtoD", OPENING),
        "operations": [operations(calls) for calls in runs],
        "kinds": [dict(Counter(kind for kind, *_ in calls)) for calls in runs],
        "copies": [{w: len(copied(calls, w)) for w in ("HtoD", "DtoH")} for calls in runs],
        "recorded": dict(Counter(kind for kind, *_ in recorded)),
        "launched": [call[:2] for call in launched],
        "filters": [said for kind, _, *said in prepared if kind == "filter"],
        "constants_of_another": copied(other, "HtoD", OPENING),
        "filters_of_another": [said for kind, _, *said in other if kind == "filter"],
    }


def main() -> None:
    """Print the facts of all parts of a model."""
    case, device, log = cases()[sys.argv[1]], StandInDevice(), CallLog()
    facts = {n: facts_of(n, g, config, case, device, log) for n, config, g in case.graphs()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
