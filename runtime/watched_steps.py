"""The steps that are shown of pictures: a strip of them beside each other, and animations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from runtime.denoising.latents import Progress
from runtime.images.files import SOURCE_KEY, Sign, write_image
from runtime.images.previews import Preview, side_by_side, write_animation
from runtime.plan import Array, Plan

__all__ = ["WatchedSteps"]


@dataclass(slots=True, kw_only=True, eq=False)
class WatchedSteps:
    """Keeps the x0 of a group's shown steps, and writes what they looked like.

    steps: that the strip shows; animations: a file for each picture, or none
    previews: draws latents by a tiny decoder; None fits a linear map to the finished pictures
    mark, sign: as `write_image` takes them
    """

    steps: Sequence[int]
    animations: Sequence[Path]
    previews: Callable[[Array], list[Image.Image]] | None
    mark: bool
    sign: Sign | None
    _seen: dict[int, Array] = field(default_factory=dict)
    _strips: list[list[Image.Image]] = field(default_factory=list)

    def see(self, progress: Progress) -> None:
        """Keep a step of the group that is drawn, if it is shown."""
        if self.animations or progress.step in self.steps:
            self._seen[progress.step] = progress.denoised()

    def finish(self, plan: Plan, latents: Array, pictures: Sequence[Image.Image]) -> list[Path]:
        """Draw the steps of a finished group; writes its animations and returns their paths.

        latents: (B, C, h, w) that the pictures were decoded from, and perhaps repeats behind them
        Raises OutputError.
        """
        count, size = len(pictures), pictures[0].size
        draw = self.previews or Preview.fit(latents[:count], pictures).draw
        frames = {
            step: [frame.resize(size) for frame in draw(seen[:count])]
            for step, seen in self._seen.items()
        }
        if plan.calls in frames:
            frames[plan.calls] = list(pictures)
        self._seen.clear()
        written = []
        for index in range(count):
            if self.steps:
                self._strips.append([frames[step][index] for step in self.steps])
            if self.animations:
                path, *self.animations = self.animations
                shots = [frames[step][index] for step in sorted(frames)]
                marked_as = plan.source_type if self.mark else None
                write_animation(path, shots, source_type=marked_as, sign=self.sign)
                written.append(path)
        return written

    def write_strip(self, plan: Plan, path: Path, *, replaces: bool) -> Path:
        """Write the steps of all pictures beside each other; returns where.

        replaces: as `write_image` takes it. Raises OutputError.
        """
        sheet = side_by_side(self._strips, [f"step {step}" for step in self.steps])
        sheet.info[SOURCE_KEY] = plan.source_type
        return write_image(sheet, path, {}, mark=self.mark, sign=self.sign, replaces=replaces)
