"""A runner without a model whose previews and pictures are ones that a browser can show."""

import io
import json
import time
from dataclasses import dataclass, field
from threading import Event

from PIL import Image, PngImagePlugin

from serving.unfinished_picture import FinishedPicture
from tests.support.model_runners import FakeModelRunner, FakePicture

SIDE = 64


def painted(seed, share):
    """Return a picture of one colour, that of a seed, the darker the further it is on its way."""
    colour = tuple(int(share * (60 + (seed * factor) % 180)) for factor in (1, 7, 31))
    return Image.new("RGB", (SIDE, SIDE), colour)


class PaintedPicture(FakePicture):
    """A picture whose file holds what was asked for."""

    @property
    def seed(self):
        return self.picture_request.fields["seed"][self.index]

    def preview(self):
        image = painted(self.seed, self.calls / self.total)

        def encode():
            file = io.BytesIO()
            image.save(file, "JPEG")
            return file.getvalue()

        return encode

    def finish(self):
        self.runner.do("finish", self)
        fields = dict(self.picture_request.fields)
        settings = {
            **fields,
            "seed": self.seed,
            "num_inference_steps": self.total,
            "height": SIDE,
            "width": SIDE,
        }
        file, told = io.BytesIO(), PngImagePlugin.PngInfo()
        told.add_text("asked", json.dumps(settings, sort_keys=True))
        painted(self.seed, 1).save(file, "PNG", pnginfo=told)
        return FinishedPicture(data=file.getvalue(), settings=settings)


@dataclass(eq=False)
class PaintedRunner(FakeModelRunner):
    """One that draws at a pace; while `goes_on` is cleared, it stands before the next step.

    seconds: of a step
    """

    seconds: float = 0.0
    goes_on: Event = field(default_factory=Event)

    def __post_init__(self):
        self.texts_cost = 0.0
        self.goes_on.set()

    def unfinished_pictures(self, picture_request):
        fakes = super().unfinished_pictures(picture_request)
        return [PaintedPicture(self, picture_request, fake.index, fake.total) for fake in fakes]

    def step(self, unfinished_pictures):
        time.sleep(self.seconds)
        assert self.goes_on.wait(60), "nobody let it go on"
        super().step(unfinished_pictures)
