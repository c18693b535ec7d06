"""Model runners: the models that a server draws with, and what it does with one, stage by stage.

A model with a set of adapters is a pipeline of its own: their weights are bound to engines, so no
two sets share a call. Small parts are opened again for each; large ones read their weights where
the file is mapped, whatever number of pipelines read them. A ControlNet is put beside a pipeline
when a request first names it, and changes none of its weights.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from engine.adapters.choice import AdapterChoice
from engine.errors import GraphError, ModelError
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.rows import rows_of
from runtime.images.files import Sign
from runtime.images.previews import Preview, probe
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.request import Request
from runtime.templates import expand_request, with_templates
from serving.checks import check_chunks
from serving.limits import Limits
from serving.model_errors import control_misfit, misfit, unavailable
from serving.model_files import Files, is_same, is_written_over
from serving.model_memory import weight_bytes
from serving.picture_request import PictureRequest
from serving.unfinished_picture import PreviewMap, RowPicture, UnfinishedPicture

log = logging.getLogger("latentrt.serving")

Lora = tuple[str, float] | tuple[str, float, float]
"""An adapter's name with its weight, or with those of the UNet and of the text encoders."""
TEXTS_SHARE = 0.02  # of the weights that embeddings of former prompts may take


class ModelRunner(Protocol):
    """What draws: the loop's only way to a model, so that it can be tested without one."""

    def unfinished_pictures(self, picture_request: PictureRequest) -> Sequence[UnfinishedPicture]:
        """Encode a request's texts; return its pictures, none begun. Raises RequestError."""
        ...

    def step(self, unfinished_pictures: Sequence[Any]) -> None:
        """Make the next step of several of one bucket, or of none of them."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Models:
    """The operator's models and adapters by name, loaded when they are first asked for.

    models, loras, controls: files and folders by the names that requests know them by
    load: makes a pipeline of a model's name or path
    wildcards: what prompts choose from
    files: of models and adapters as the server began, by their paths
    budget: bytes of weights that stay loaded, None for any number; the model last asked for stays
        whatever it takes, and pictures on their way keep theirs
    sign: signs files, as `write_image` takes it; watermark: that all pictures hold, or None
    """

    models: Mapping[str, str | Path]
    loras: Mapping[str, Path]
    load: Callable[[str | Path], Pipeline]
    limits: Limits
    controls: Mapping[str, Path] = field(default_factory=dict)
    wildcards: Wildcards | None = None
    files: Mapping[str, Files] = field(default_factory=dict)
    budget: int | None = None
    sign: Sign | None = None
    watermark: str | None = None
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
        nets = tuple(dict.fromkeys(control.net for control in picture_request.controls))
        pipeline, preview_map = self._pipeline(picture_request.model, loras, nets)
        check_chunks(pipeline, request, self.limits.chunks)
        if picture_request.preview_every:
            preview_map()  # here, or the first previews would wait and be passed over by later ones
        plan = self._plan(pipeline, picture_request.model, loras, request)
        plan = plan if template is request else with_templates(plan, template)
        plan = replace(plan, notes=[*notes, *plan.notes])
        if self.watermark:
            from runtime.finishing import check_watermark_fits  # which most servers do not need

            check_watermark_fits(plan)
        exact = pipeline.engines.is_exact
        return [
            RowPicture(
                row, pipeline, preview_map, picture_request, exact, self.sign, self.watermark
            )
            for row in rows_of(plan)
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

    def _pipeline(
        self, model: str, loras: Sequence[Lora], nets: Sequence[str]
    ) -> tuple[Pipeline, PreviewMap]:
        """Return a model with its adapters, and these ControlNets beside it; loads what is not."""
        key = (model, tuple(loras))
        with self._lock:
            self._check_files(model, loras, nets, is_open=key in self._open)
            if key in self._open:
                self._open.move_to_end(key)
                self._put_beside(key, nets)
            if key not in self._open:
                pipeline = self.load(self.models[model])
                self._make_room(weight_bytes(pipeline))
                self._put_on(pipeline, model, loras)
                texts = pipeline.encoder.cache
                texts.limit = min(texts.limit, int(TEXTS_SHARE * weight_bytes(pipeline)))
                self._open[key] = pipeline, _preview_map(pipeline)
                self._put_beside(key, nets)
            return self._open[key]

    def _put_beside(self, key: tuple[str, tuple[Lora, ...]], nets: Sequence[str]) -> None:
        """Put ControlNets beside an open model, which is let go of where all take too much.

        Pictures on their way keep those that they have. Raises RequestError for one of another
        family.
        """
        pipeline, _ = self._open[key]
        before = pipeline.control_nets.names
        added = [net for net in nets if net not in before]
        if not added:
            return
        known = {name: pipeline.control_nets.path(name) for name in before}
        try:
            pipeline.set_controls({**known, **{net: self.controls[net] for net in added}})
        except ModelError as error:
            raise control_misfit(key[0], added) from error
        self._make_room(0, key)
        if before and self.budget is not None and self._held > self.budget:
            del self._open[key]  # to be opened with these alone

    def _check_files(
        self, model: str, loras: Sequence[Lora], nets: Sequence[str], *, is_open: bool
    ) -> None:
        """Refuse files that are others than the server began with. Raises UnavailableError."""
        paths = {model: Path(self.models[model])}
        paths |= {name: self.loras[name] for name, *_ in loras}
        paths |= {name: self.controls[name] for name in nets}
        for name, path in paths.items():
            before = self.files.get(str(path), {})
            if is_written_over(path, before) if is_open else not is_same(path, before):
                raise unavailable(name, "is another file now than the server began with")

    @property
    def _held(self) -> int:
        return sum(weight_bytes(pipeline) for pipeline, _ in self._open.values())

    def _make_room(self, needed: int, kept: Hashable = None) -> None:
        """Let go of the models that were asked for longest ago, but not of the one that is kept."""
        while self.budget is not None and self._held + needed > self.budget:
            oldest = next((key for key in self._open if key != kept), None)
            if oldest is None:
                return
            del self._open[oldest]

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
        except GraphError as error:
            if not request.controls:
                raise
            log.exception("a ControlNet cannot be drawn with")
            nets = " and ".join(dict.fromkeys(control.net for control in request.controls))
            raise unavailable(
                nets, f"cannot steer the model {model}: a graph is missing"
            ) from error
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
