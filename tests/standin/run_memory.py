"""Work on a GPU that is too small for all forms at once; prints what was taken of it, as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_memory.py
"""

import json
import os

import numpy as np

from engine.backends.onnxruntime.cuda import OnnxRuntimeCudaEngine
from engine.errors import BackendError
from tests.standin.call_log import CallLog, arena
from tests.standin.device import DRIVERS_OWN, StandInDevice
from tests.standin.models import cases

ROOM = 36 << 20  # bytes for the sessions
SIDES, TOO_LARGE = (16, 24, 32, 28, 20), 96
CLAIMED = 8 << 20


class SmallDevice(StandInDevice):
    """The stand-in, which may say that less is free than there is; claimed: bytes."""

    claimed = ROOM

    def memory(self) -> tuple[int, int]:
        free, total = super().memory()
        return min(free, self.claimed), total


def main() -> None:
    """Open forms of a decoder one after the other, one that fits nowhere, and another.

    The last is opened where the device says that little is free.
    """
    case, log = cases()["pictogram"], CallLog()
    graph = case.graph("vae_decoder")
    weights = {name: np.zeros(shape, graph.precision) for name, shape in graph.weights.items()}
    nbytes = sum(array.nbytes for array in weights.values())
    os.environ["LATENTRT_CUDA_BYTES"] = str(DRIVERS_OWN + nbytes + ROOM)
    device = SmallDevice()
    engine = OnnxRuntimeCudaEngine(graph, weights, device)

    def opened(side: int) -> dict[str, object]:
        log.take()
        shapes, said = {"latents": (1, 8, side, side)}, ""
        try:
            engine.prepare(shapes)
        except BackendError as error:
            said = str(error)
        calls = log.take()
        held, most = arena(calls)
        return {
            "change": held,
            "most": most,
            "exhausted": sum(kind == "exhausted" for kind, *_ in calls),
            "forms": len(engine._forms.opened()),
            "held": engine.held,
            "said": said,
        }

    small = [opened(side) for side in SIDES]
    facts = {"small": small, "large": opened(TOO_LARGE), "again": opened(SIDES[0])}
    engine._forms.clear()
    device.claimed = CLAIMED
    facts |= {"claimed": opened(SIDES[1]), "claim": CLAIMED, "room": ROOM}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
