"""Model runners: the models that a server draws with, and what it does with one, stage by stage.

A model with a set of adapters is a pipeline of its own: their weights are bound to engines, so no
two sets share a call. Small parts are opened again for each; large ones read their weights where
the file is mapped, whatever number of pipelines read them.
"""

import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from engine.adapters.choice import AdapterChoice
from engine.backends.settings import DEFAULT
from engine.errors import ModelError
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.rows import Row, rows_of
from runtime.images.files import encode_image, program_version
from runtime.images.previews import Preview, probe
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.request import Request
from runtime.templates import expand_request, with_templates
from serving.checks import check_chunks
from serving.limits import Limits
from serving.model_errors import misfit, not_finite, unavailable
from serving.model_files import Files, is_same, is_written_over
from serving.model_memory import fitting_rows, weight_bytes
from serving.picture_request import PictureRequest

log = logging.getLogger("latentrt.serving")

PREVIEW_QUALITY = 80
Lora = tuple[str, float] | tuple[str, float, float]
"""An adapter's name with its weight, or with those of the UNet and of the text encoders."""
PreviewMap = Callable[[], Preview]
"""Fits how previews are drawn, at the first call: that decodes, which a start does not wait for."""
TEXTS_SHARE = 0.02  # of the weights that embeddings of former prompts may take


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


class ModelRunner(Protocol):
    """What draws: the loop's only way to a model, so that it can be tested without one."""

    def unfinished_pictures(self, picture_request: PictureRequest) -> Sequence[UnfinishedPicture]:
        """Encode a request's texts; return its pictures, none begun. Raises RequestError."""
        ...

    def step(self, unfinished_pictures: Sequence[Any]) -> None:
        """Make the next step of several of one bucket, or of none of them."""
        ...


@dataclass(slots=True, eq=False)
class RowPicture:
    """A row of a pipeline."""

    row: Row
    pipeline: Pipeline
    preview_map: PreviewMap
    picture_request: PictureRequest
    exact: bool

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
        """As `UnfinishedPicture` says; adapters change no time."""
        return f"{self.picture_request.model} {self.row.bucket}"

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
        told = {**settings, "notes": list(plan.notes)} if plan.notes else settings
        data = encode_image(
            image, self.picture_request.format, settings, quality=self.picture_request.quality
        )
        return FinishedPicture(data=data, settings=told)


@dataclass(slots=True, kw_only=True, eq=False)
class Models:
    """The operator's models and adapters by name, loaded when they are first asked for.

    models, loras: files and folders by the names that requests know them by
    load: makes a pipeline of a model's name or path
    wildcards: what prompts choose from
    files: of models and adapters as the server began, by their paths
    budget: bytes of weights that stay loaded, None for any number; the model last asked for stays
        whatever it takes, and pictures on their way keep theirs
    """

    models: Mapping[str, str | Path]
    loras: Mapping[str, Path]
    load: Callable[[str | Path], Pipeline]
    limits: Limits
    wildcards: Wildcards | None = None
    files: Mapping[str, Files] = field(default_factory=dict)
    budget: int | None = None
    _open: "OrderedDict[Hashable, tuple[Pipeline, PreviewMap]]" = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def unfinished_pictures(self, picture_request: PictureRequest) -> list[RowPicture]:
        """As `ModelRunner` says; UnavailableError for a model that cannot be loaded now."""
        try:
            return self._begin(picture_request)
        except ModelError as error:
            log.exception("a model cannot be loaded")
            raise unavailable(picture_request.model, "cannot be loaded") from error

    def _begin(self, picture_request: PictureRequest) -> list[RowPicture]:
        request, notes = picture_request.request(), list[str]()
        template = request
        if request.is_template:
            request, notes = expand_request(request, self.wildcards)
        loras = [*picture_request.loras, *self._named(picture_request, request)]
        pipeline, preview_map = self._pipeline(picture_request.model, loras)
        check_chunks(pipeline, request, self.limits.chunks)
        if picture_request.preview_every:
            preview_map()  # here, or the first previews would wait and be passed over by later ones
        plan = self._plan(pipeline, picture_request.model, loras, request)
        plan = plan if template is request else with_templates(plan, template)
        plan = replace(plan, notes=[*notes, *plan.notes])
        exact = pipeline.engines.is_exact
        return [
            RowPicture(row, pipeline, preview_map, picture_request, exact) for row in rows_of(plan)
        ]

    def step(self, unfinished_pictures: Sequence[RowPicture]) -> None:
        """As `ModelRunner` says."""
        rows = [unfinished.row for unfinished in unfinished_pictures]
        unfinished_pictures[0].pipeline.step_rows(rows)

    def warm(self, model: str) -> None:
        """Load a model, open its parts and make a step, so that no request waits for that."""
        picture_request = PictureRequest(
            fields={"prompt": "", "num_inference_steps": 1, "seed": 0}, model=model
        )
        (unfinished,) = self._begin(picture_request)
        unfinished.enter()
        while not unfinished.is_done:
            self.step([unfinished])

    def _named(self, picture_request: PictureRequest, request: Request) -> list[Lora]:
        """Return those of the operator's adapters that the prompt names, `<lora:name:0.8>`."""
        known = {name.lower(): name for name in self.loras}
        given = {name.lower() for name, *_ in picture_request.loras}
        tags = [(known.get(tag.name.lower()), tag) for tag in request.adapters]
        return [
            (name, tag.unet, tag.text_encoder)
            for name, tag in tags
            if name is not None and name.lower() not in given
        ]

    def _pipeline(self, model: str, loras: Sequence[Lora]) -> tuple[Pipeline, PreviewMap]:
        """Return a model with its adapters, loading it if it is not."""
        key = (model, tuple(loras))
        with self._lock:
            self._check_files(model, loras, is_open=key in self._open)
            if key not in self._open:
                pipeline = self.load(self.models[model])
                self._make_room(weight_bytes(pipeline))
                self._put_on(pipeline, model, loras)
                texts = pipeline.encoder.cache
                texts.limit = min(texts.limit, int(TEXTS_SHARE * weight_bytes(pipeline)))
                self._open[key] = pipeline, _preview_map(pipeline)
            self._open.move_to_end(key)
            return self._open[key]

    def _check_files(self, model: str, loras: Sequence[Lora], *, is_open: bool) -> None:
        """Refuse files that are others than the server began with. Raises UnavailableError."""
        paths = {model: Path(self.models[model])}
        paths |= {name: self.loras[name] for name, *_ in loras}
        for name, path in paths.items():
            before = self.files.get(str(path), {})
            if is_written_over(path, before) if is_open else not is_same(path, before):
                raise unavailable(name, "is another file now than the server began with")

    def _make_room(self, needed: int) -> None:
        """Let go of the models that were asked for longest ago, before another is opened."""
        while self.budget is not None and self._open:
            held = sum(weight_bytes(pipeline) for pipeline, _ in self._open.values())
            if held + needed <= self.budget:
                return
            self._open.popitem(last=False)

    def _put_on(self, pipeline: Pipeline, model: str, loras: Sequence[Lora]) -> None:
        """Put a request's adapters on. Raises RequestError where one does not fit."""
        chosen = [
            AdapterChoice(
                path=self.loras[name], unet=weights[0], text_encoder=weights[-1], name=name
            )
            for name, *weights in loras
        ]
        try:
            pipeline.set_loras(chosen)
        except ModelError as error:
            raise misfit(model, [name for name, *_ in loras]) from error

    def _plan(
        self, pipeline: Pipeline, model: str, loras: Sequence[Lora], request: Request
    ) -> Plan:
        """Plan a request and open what it needs, so that what is damaged is found before a step."""
        try:
            plan = pipeline.plan(request)
            pipeline.open_engines(plan)
        except ModelError as error:
            with self._lock:
                self._open.pop((model, tuple(loras)), None)
            if loras:
                raise misfit(model, [name for name, *_ in loras]) from error
            raise
        return plan


def _preview_map(pipeline: Pipeline) -> PreviewMap:
    @cache
    def fitted() -> Preview:
        latents = probe(pipeline.model.vae.latent_channels)
        return Preview.fit(latents, pipeline.decode(latents))

    return fitted
