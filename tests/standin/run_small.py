"""Draw pictures on a GPU with room for one size of them; prints what became of each, as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_small.py
"""

import json
import os

from engine.backends.settings import BackendSettings
from engine.errors import BackendError
from runtime import Pipeline
from tests.standin.device import DRIVERS_OWN
from tests.standin.run_pictures import on_the_stand_in

ROOM = 84 << 20  # bytes, for the weights and one size of pictures
SIDES, TOO_LARGE = (256, 192, 224, 256, 192), 1024


def main() -> None:
    """Draw sizes in turn, twice each so that they are recorded, and one that fits nowhere."""
    os.environ["LATENTRT_CUDA_BYTES"] = str(DRIVERS_OWN + ROOM)
    device = on_the_stand_in()
    settings = BackendSettings(backend="cuda")
    pipeline = Pipeline.load("pictogram", precision="float16", settings=settings)

    def drawn(side: int) -> dict[str, object]:
        said = ""
        try:
            for seed in range(2):
                pipeline("a hat", seed=seed, height=side, width=side, num_inference_steps=4)
        except BackendError as error:
            said = str(error)
        engines = pipeline.engines.opened
        return {
            "said": said,
            "forms": {part: len(engine.opened()) for part, engine in engines.items()},
            "held": sum(engine.held for engine in engines.values()),
            "recorded": device.recorded,
        }

    small = [drawn(side) for side in SIDES]
    facts = {"small": small, "large": drawn(TOO_LARGE), "again": drawn(SIDES[0])}
    print(json.dumps({**facts, "room": ROOM}))


if __name__ == "__main__":
    main()
