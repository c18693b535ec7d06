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
STAGES = ("texts", "enter", "step", "preview", "finish")


class DyingStudio(FakeModelRunner):
    """Dies of "poison" in a step, of "bad text" in its text, once of "STAGE once PATH" in that.

    "card PATH" writes which GPUs it sees.
    """

    def warm(self, model):
        """Die as often as the file says that was named after the program."""
        for name in sys.argv[2:]:
            left = int(Path(name).read_text())
            if left:
                Path(name).write_text(str(left - 1))
                os._exit(9)

    def do(self, stage, unfinished):
        prompt = unfinished.picture_request.fields["prompt"]
        if stage == "step" and prompt == "poison" and unfinished.calls > 1:
            os._exit(9)
        if stage == "step" and prompt.startswith("card "):
            card = Path(prompt.removeprefix("card "))
            card.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        die_once(stage, prompt)
        super().do(stage, unfinished)

    def unfinished_pictures(self, picture_request):
        prompt = picture_request.fields["prompt"]
        if prompt == "bad text":
            os._exit(9)
        die_once("texts", prompt)
        pictures = super().unfinished_pictures(picture_request)
        for picture in pictures:
            preview = picture.preview
            picture.preview = lambda preview=preview: dying_preview(prompt, preview())
        return pictures

    def step(self, unfinished_pictures):
        time.sleep(0.002)
        super().step(unfinished_pictures)


def dying_preview(prompt, draw):
    """Return what dies in the place of a preview, if it is to."""

    def drawn():
        die_once("preview", prompt)
        return draw()

    return drawn


def die_once(stage, prompt):
    """End this process where a prompt wants it, if it has not done so before."""
    wanted, _, path = prompt.partition(" once ")
    if wanted == stage and not Path(path).exists():
        Path(path).touch()
        os._exit(9)


def main():
    """Draw as an engine's process does."""
    sys.exit(child(lambda settings: DyingStudio(texts_cost=0.0)))
