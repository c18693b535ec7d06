"""An engine's process without a model, in which some prompts kill it: `main` is its program."""

import os
import sys
import time
from pathlib import Path

from serving.child import main as child
from tests.support.model_runners import FakeModelRunner

ROOT = str(Path(__file__).parents[2])
START = "import sys; sys.path.insert(0, sys.argv[1]); from tests.support.dying import main; main()"
COMMAND = (sys.executable, "-P", "-c", START, ROOT)


class DyingStudio(FakeModelRunner):
    """Dies of "poison" in a step, of "bad text" in its text, once of "once PATH" in a step.

    "card PATH" writes which GPUs it sees.
    """

    def warm(self, model):
        pass

    def unfinished_pictures(self, picture_request):
        if picture_request.fields["prompt"] == "bad text":
            os._exit(9)
        return super().unfinished_pictures(picture_request)

    def step(self, unfinished_pictures):
        time.sleep(0.002)
        for unfinished in unfinished_pictures:
            prompt, _, path = unfinished.picture_request.fields["prompt"].partition(" ")
            if prompt == "poison" and unfinished.calls > 1:
                os._exit(9)
            if prompt == "card":
                Path(path).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            if prompt == "once" and not Path(path).exists():
                Path(path).touch()
                os._exit(9)
        super().step(unfinished_pictures)


def main():
    """Draw as an engine's process does."""
    sys.exit(child(lambda settings: DyingStudio(texts_cost=0.0)))
