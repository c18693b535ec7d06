"""What is done to a drawn picture before it is written: checked, enlarged, watermarked."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import LatentrtError, RequestError
from runtime.images.safety import SafetyChecker, blurred
from runtime.images.upscaler import Upscaler
from runtime.images.upscaling import UpscalerChoice, parse_upscaler
from runtime.images.watermark import check_watermark_size, embed_watermark
from runtime.output_options import UPSAMPLING, sampling_of
from runtime.plan import Plan
from runtime.terminal import say, show_progress

__all__ = ["FinishedPicture", "Finisher", "check_watermark_fits", "picture_size"]

FLAG, BLUR, REFUSE = "flag", "blur", "refuse"
SAFETY_KEY = "safety"  # in a file's settings
FOUND = "the safety checker finds it unsafe"


class FinishedPicture(NamedTuple):
    """A picture to be written, or None; what its file says further; a note on it."""

    image: Image.Image | None
    settings: Mapping[str, Any]
    note: str = ""


def check_watermark_fits(plan: Plan, factor: float = 1.0) -> None:
    """Raise RequestError where the pictures of a plan, enlarged, are too small for a watermark."""
    width, height = picture_size(plan)
    check_watermark_size(round(width * factor), round(height * factor))


def picture_size(plan: Plan) -> tuple[int, int]:
    """Return the width and height of a plan's pictures."""
    *_, last = plan.runs()
    return plan.frame.image.size if plan.frame else (last.width, last.height)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finisher:
    """Checks, enlarges and watermarks pictures, as far as that was asked for.

    choice: the upscaler's, with its factor
    action: what happens to a picture that the checker flags
    """

    checker: SafetyChecker | None
    action: str
    upscaler: Upscaler | None
    choice: UpscalerChoice | None
    watermark: str | None

    @classmethod
    def of(cls, options: argparse.Namespace, backend: BackendSettings) -> Self:
        """Open what the options name, before a step.

        Raises RequestError, ModelError or BackendError.
        """
        checker = upscaler = choice = None
        if options.safety_checker:
            hides = options.safety_action in (BLUR, REFUSE)
            if hides and (options.preview_steps or options.animation):
                raise RequestError(
                    f"--safety-action {options.safety_action} came with previews, which would show "
                    "what it hides; leave out --preview-steps and --animation"
                )
            checker = SafetyChecker.load(options.safety_checker, settings=backend)
        elif options.safety_action:
            raise RequestError("--safety-action came without --safety-checker; give its folder")
        if options.upscale:
            choice = parse_upscaler(options.upscale)
            sampling = sampling_of(options)
            upscaler = Upscaler.load(choice.path, settings=backend, sampling=sampling)
            for note in upscaler.file.notes:
                say(f"note: {note}", sys.stderr)
        elif given := [name for name in UPSAMPLING if getattr(options, name) is not None]:
            option = f"--{given[0].replace('_', '-')}"
            raise RequestError(f"{option} came without --upsample; give its file")
        return cls(
            checker=checker,
            action=options.safety_action or FLAG,
            upscaler=upscaler,
            choice=choice,
            watermark=options.watermark,
        )

    def check_size(self, plan: Plan) -> None:
        """Raise RequestError where pictures of a plan become too large, or hold no watermark."""
        factor = 1.0
        if self.upscaler and self.choice:
            *_, last = plan.runs()
            self.upscaler.check_size(last.width, last.height, self.choice.factor)
            factor = self.choice.factor or self.upscaler.scale
        if self.watermark:
            check_watermark_fits(plan, factor)

    def finished(self, images: Sequence[Image.Image]) -> Iterator[FinishedPicture]:
        """Yield what is to be written of each picture; raises BackendError where none is checked.

        A picture that cannot be enlarged stays as it was drawn.
        """
        for image in images:
            settings, note = dict[str, Any](), ""
            if self.checker and self.checker(image).is_flagged:
                if self.action == REFUSE:
                    yield FinishedPicture(None, {}, f"not written: {FOUND}")
                    continue
                is_blurred = self.action == BLUR
                image = blurred(image) if is_blurred else image
                settings = {SAFETY_KEY: "blurred" if is_blurred else "flagged"}
                note = f"{FOUND}, and it is blurred" if is_blurred else FOUND
            image = self._enlarged(image)
            if self.watermark:
                image = embed_watermark(image, self.watermark)
            yield FinishedPicture(image, settings, note)

    def check_written(self, written: int, count: int) -> None:
        """Raise RequestError where fewer pictures were written than drawn."""
        if written < count:
            raise RequestError(
                f"{count - written} of {count} pictures were not written, because the safety "
                "checker finds them unsafe; take another prompt or seed"
            )

    def _enlarged(self, image: Image.Image) -> Image.Image:
        if not self.upscaler or not self.choice:
            return image
        counted = partial(show_progress, noun="tile")
        try:
            return self.upscaler(image, self.choice.factor, on_tile=counted)
        except LatentrtError as error:
            say(f"note: not enlarged: {error}", sys.stderr)
            return image
