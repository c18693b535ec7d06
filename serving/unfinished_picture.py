"""A picture on its way in the engine, as its loop sees it, and one that is a row of a pipeline."""

import io
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine.backends.settings import DEFAULT
from runtime.denoising.rows import Row
from runtime.images.files import Sign, encode_image, program_version, source_type_of
from runtime.images.previews import Preview
from runtime.images.watermark import embed_watermark
from runtime.pipeline import Pipeline
from serving.model_errors import not_finite
from serving.model_memory import fitting_rows
from serving.picture_request import PictureRequest

__all__ = ["FinishedPicture", "PreviewMap", "RowPicture", "UnfinishedPicture"]

PREVIEW_QUALITY = 80
PreviewMap = Callable[[], Preview]
"""Fits how previews are drawn, at the first call: that decodes, which a start does not wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPicture:
    """A finished picture: its file, and what makes it again."""

    data: bytes
    settings: Mapping[str, Any]


class UnfinishedPicture(Protocol):
    """A picture on its way, as the engine's loop sees it."""

    @property
    def bucket(self) -> Hashable:
        """Those with an equal one may be stepped together."""
        ...

    @property
    def form(self) -> str:
        """What its next call has in common with others of as many rows, in every process."""
        ...

    def fitting_rows(self) -> int:
        """Return how many rows of its next call's form fit into the memory that is free."""
        ...

    @property
    def calls(self) -> int:
        """How many steps were made, all runs together."""
        ...

    @property
    def total(self) -> int:
        """How many there are."""
        ...

    @property
    def run_is_over(self) -> bool:
        """Whether another run must be entered, or the picture is done."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        ...

    def enter(self) -> None:
        """Begin the next run; takes longer than a step."""
        ...

    def preview(self) -> Callable[[], bytes]:
        """Return what draws a JPEG of what the picture is about to become, on any thread."""
        ...

    def finish(self) -> FinishedPicture:
        """Decode the finished picture and make its file."""
        ...


@dataclass(slots=True, eq=False)
class RowPicture:
    """A row of a pipeline."""

    row: Row
    pipeline: Pipeline
    preview_map: PreviewMap
    picture_request: PictureRequest
    exact: bool
    sign: Sign | None = None
    watermark: str | None = None

    @property
    def bucket(self) -> Hashable:
        """As `UnfinishedPicture` says; a row that neighbours would change has one of its own."""
        alone = (
            id(self)
            if self.picture_request.exact or (self.exact and self.row.is_sensitive)
            else None
        )
        return id(self.pipeline), self.row.bucket, alone

    @property
    def form(self) -> str:
        """As `UnfinishedPicture` says; adapters change no time, and every control costs some."""
        return f"{self.picture_request.model} {self.row.bucket} {len(self.row.controls)}"

    def fitting_rows(self) -> int:
        """As `UnfinishedPicture` says."""
        return fitting_rows(self.pipeline, self.row)

    @property
    def calls(self) -> int:
        """As `UnfinishedPicture` says."""
        return self.row.calls

    @property
    def total(self) -> int:
        """As `UnfinishedPicture` says."""
        return self.row.total

    @property
    def run_is_over(self) -> bool:
        """As `UnfinishedPicture` says."""
        return self.row.run_is_over

    @property
    def is_done(self) -> bool:
        """As `UnfinishedPicture` says."""
        return self.row.is_done

    def enter(self) -> None:
        """As `UnfinishedPicture` says."""
        self.row.enter(self.pipeline.start)

    def preview(self) -> Callable[[], bytes]:
        """As `UnfinishedPicture` says; by a linear map, fitted when it is first asked for."""
        denoised = self.row.denoised(self.pipeline.schedule)

        def draw() -> bytes:
            (image,) = self.preview_map().draw(denoised(), self.pipeline.model.vae.compression)
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=PREVIEW_QUALITY)
            return file.getvalue()

        return draw

    def finish(self) -> FinishedPicture:
        """As `UnfinishedPicture` says. Raises EngineFailedError for latents that are no numbers."""
        latents = self.row.latents
        if not np.isfinite(latents).all():
            raise not_finite(self.picture_request.model)
        plan = self.row.plan
        (image,) = self.pipeline.finish(plan, self.pipeline.decode(latents, plan))
        chosen = self.pipeline.engines
        settings = {
            **plan.settings[0],
            "model": self.picture_request.model,
            "loras": [f"{name}:{weight:g}" for name, weight in self.picture_request.loras],
            "backend": chosen.settings.backend or DEFAULT,
            "precision": chosen.precision,
            "latentrt": program_version(),
        }
        if self.picture_request.hires_upscaler is not None:
            hires = {**settings["hires"], "upscaler": self.picture_request.hires_upscaler}
            settings["hires"] = hires
        if self.watermark:
            image = embed_watermark(image, self.watermark)
            settings["watermark"] = self.watermark
        told = {**settings, "notes": list(plan.notes)} if plan.notes else settings
        kind, quality = self.picture_request.format, self.picture_request.quality
        data = encode_image(image, kind, settings, quality=quality)
        if self.sign:
            data = self.sign(data, kind, source_type_of(image))
        return FinishedPicture(data=data, settings=told)
