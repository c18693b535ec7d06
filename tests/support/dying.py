"""An engine's process without a model, in which some prompts kill it: `main` is its program."""

import os
import sys
import time
from pathlib import Path

from serving.child import main as child
from tests.support.studios import FakeStudio

ROOT = str(Path(__file__).parents[2])
START = "import sys; sys.path.insert(0, sys.argv[1]); from tests.support.dying import main; main()"
COMMAND = (sys.executable, "-P", "-c", START, ROOT)


class DyingStudio(FakeStudio):
    """Dies of "poison" in a step, of "bad text" in its text, once of "once PATH" in a step."""

    def warm(self, model):
        pass

    def sketches(self, wish):
        if wish.fields["prompt"] == "bad text":
            os._exit(9)
        return super().sketches(wish)

    def step(self, sketches):
        time.sleep(0.002)
        for sketch in sketches:
            prompt, _, path = sketch.wish.fields["prompt"].partition(" ")
            if prompt == "poison" and sketch.calls > 1:
                os._exit(9)
            if prompt == "once" and not Path(path).exists():
                Path(path).touch()
                os._exit(9)
        super().step(sketches)


def main():
    """Draw as an engine's process does."""
    sys.exit(child(lambda settings: DyingStudio(texts_cost=0.0)))
