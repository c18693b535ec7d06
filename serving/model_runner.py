"""Model runners: the models that a server draws with, and what it does with one, stage by stage.

A model with a set of adapters is a pipeline of its own: their weights are bound to engines, so no
two sets share a call. Small parts are opened again for each; large ones read their weights where
the file is mapped, whatever number of pipelines read them. A ControlNet or an IP-Adapter is put
beside a pipeline when a request first names it, and changes none of its weights. Upscalers belong
to no model.
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
from engine.backends.settings import BackendSettings
from engine.errors import GraphError, ModelError
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.rows import rows_of
from runtime.images.files import Sign
from runtime.images.previews import Preview, probe
from runtime.images.upscaler import Upscaler
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.request import Request
from runtime.templates import expand_request, with_templates
from serving.checks import check_chunks
from serving.enlarging_picture import EnlargingPicture
from serving.enlarging_request import EnlargingRequest
from serving.limits import Limits
from serving.model_errors import control_misfit, ip_adapter_misfit, misfit, unavailable
from serving.model_files import Files, is_same, is_written_over
from serving.model_memory import upscaler_bytes, weight_bytes
from serving.picture_request import PictureRequest
from serving.unfinished_picture import PreviewMap, RowPicture, UnfinishedPicture

log = logging.getLogger("latentrt.serving")

Lora = tuple[str, float] | tuple[str, float, float]
"""An adapter's name with its weight, or with those of the UNet and of the text encoders."""
TEXTS_SHARE = 0.02  # of the weights that embeddings of former prompts may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What steers a request's pictures beside its model: names of ControlNets and IP-Adapters."""

    nets: Sequence[str] = ()
    ip_adapters: Sequence[str] = ()


class ModelRunner(Protocol):
    """What draws: the loop's only way to a model, so that it can be tested without one."""

    def unfinished_pictures(
        self, picture_request: PictureRequest | EnlargingRequest
    ) -> Sequence[UnfinishedPicture]:
        """Encode a request's texts; return its pictures, none begun. Raises RequestError."""
        ...

    def step(self, unfinished_pictures: Sequence[Any]) -> None:
        """Make the next step of several of one bucket, or of none of them."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Models:
    """The operator's models and adapters by name, loaded when they are first asked for.

    models, loras, controls, ip_adapters, upscalers: files and folders by the names that requests
        know them by; image_encoders: folders, by the names of the IP-Adapters
    threads: of upscalers, None for one for each core
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
    ip_adapters: Mapping[str, Path] = field(default_factory=dict)
    image_encoders: Mapping[str, Path] = field(default_factory=dict)
    upscalers: Mapping[str, Path] = field(default_factory=dict)
    threads: int | None = None
    wildcards: Wildcards | None = None
    files: Mapping[str, Files] = field(default_factory=dict)
    budget: int | None = None
    sign: Sign | None = None
    watermark: str | None = None
    _open: "OrderedDict[Hashable, tuple[Pipeline, PreviewMap]]" = field(default_factory=OrderedDict)
    _open_upscalers: "OrderedDict[str, Upscaler]" = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def unfinished_pictures(
        self, picture_request: PictureRequest | EnlargingRequest
    ) -> Sequence[RowPicture | EnlargingPicture]:
        """As `ModelRunner` says; UnavailableError for a model that cannot be loaded now."""
        if isinstance(picture_request, EnlargingRequest):
            named = None if picture_request.is_plain else self._upscaler(picture_request.upscaler)
            return [EnlargingPicture(picture_request, named, self.limits.upscaled_pixels)]
        try:
            return self._begin(picture_request)
        except ModelError as error:
            log.exception("a model cannot be loaded")
            raise unavailable(picture_request.model, "cannot be loaded") from error

    def _begin(self, picture_request: PictureRequest) -> list[RowPicture]:
        request, notes = picture_request.request(self.upscalers), list[str]()
        template = request
        if request.is_template:
            request, notes = expand_request(request, self.wildcards)
        loras = [*picture_request.loras, *self._named(picture_request, request)]
        beside = Beside(
            nets=tuple(dict.fromkeys(each.net for each in picture_request.controls)),
            ip_adapters=tuple(
                dict.fromkeys(each.adapter for each in picture_request.image_prompts)
            ),
        )
        pipeline, preview_map = self._pipeline(picture_request.model, loras, beside)
        if picture_request.hires_upscaler is not None:
            kept = picture_request.model, tuple(loras)
            self._upscaler(picture_request.hires_upscaler, kept)
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

    def step(self, unfinished_pictures: Sequence[RowPicture | EnlargingPicture]) -> None:
        """As `ModelRunner` says."""
        first = unfinished_pictures[0]
        if isinstance(first, EnlargingPicture):
            first.step()
            return
        rows = [each.row for each in unfinished_pictures if isinstance(each, RowPicture)]
        first.pipeline.step_rows(rows)

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
        self, model: str, loras: Sequence[Lora], beside: Beside
    ) -> tuple[Pipeline, PreviewMap]:
        """Return a model with its adapters, and what steers it beside it; loads what is not."""
        key = (model, tuple(loras))
        with self._lock:
            self._check_files(model, loras, beside, is_open=key in self._open)
            if key in self._open:
                self._open.move_to_end(key)
                self._put_beside(key, beside)
            if key not in self._open:
                pipeline = self.load(self.models[model])
                self._make_room(weight_bytes(pipeline))
                self._put_on(pipeline, model, loras)
                texts = pipeline.encoder.cache
                texts.limit = min(texts.limit, int(TEXTS_SHARE * weight_bytes(pipeline)))
                pipeline.share_upscalers(self._open_upscalers)
                self._open[key] = pipeline, _preview_map(pipeline)
                self._put_beside(key, beside)
            return self._open[key]

    def _upscaler(self, name: str, kept: Hashable = None) -> Upscaler:
        """Return an upscaler of the operator's, opened at the first call.

        kept: the model that it is opened for, which stays
        Raises UnavailableError.
        """
        path = self.upscalers[name]
        with self._lock:
            found = self._open_upscalers.get(str(path))
            self._check_file(name, path, is_open=found is not None)
            if found is None:
                settings = BackendSettings(threads=self.threads)
                try:
                    found = Upscaler.load(path, settings=settings)
                except ModelError as error:
                    log.exception("an upscaler cannot be loaded")
                    raise unavailable(name, "cannot be loaded") from error
                self._open_upscalers[str(path)] = found
                self._make_room(0, kept)
            self._open_upscalers.move_to_end(str(path))
        return found

    def _put_beside(self, key: tuple[str, tuple[Lora, ...]], beside: Beside) -> None:
        """Put what steers beside an open model, which is let go of where all take too much.

        Pictures on their way keep what they have. Raises RequestError for one of another family.
        """
        pipeline, _ = self._open[key]
        nets, adapters = pipeline.control_nets.names, pipeline.ip_adapters.names
        before = (*nets, *adapters)
        new_nets = [name for name in beside.nets if name not in nets]
        new_adapters = [name for name in beside.ip_adapters if name not in adapters]
        if not new_nets and not new_adapters:
            return
        try:
            if new_nets:
                pipeline.set_controls({name: self.controls[name] for name in (*nets, *new_nets)})
        except ModelError as error:
            raise control_misfit(key[0], new_nets) from error
        try:
            if new_adapters:
                named = {name: self.ip_adapters[name] for name in (*adapters, *new_adapters)}
                pipeline.set_ip_adapters(named, {name: self.image_encoders[name] for name in named})
        except ModelError as error:
            raise ip_adapter_misfit(key[0], new_adapters) from error
        self._make_room(0, key)
        if before and self.budget is not None and self._held > self.budget:
            del self._open[key]  # to be opened with these alone

    def _check_files(
        self, model: str, loras: Sequence[Lora], beside: Beside, *, is_open: bool
    ) -> None:
        """Refuse files that are others than the server began with. Raises UnavailableError."""
        paths = [(model, Path(self.models[model]))]
        paths += [(name, self.loras[name]) for name, *_ in loras]
        paths += [(name, self.controls[name]) for name in beside.nets]
        for name in beside.ip_adapters:
            paths += [(name, self.ip_adapters[name]), (name, self.image_encoders[name])]
        for name, path in paths:
            self._check_file(name, path, is_open=is_open)

    def _check_file(self, name: str, path: Path, *, is_open: bool) -> None:
        before = self.files.get(str(path), {})
        if is_written_over(path, before) if is_open else not is_same(path, before):
            raise unavailable(name, "is another file now than the server began with")

    @property
    def _held(self) -> int:
        models = sum(weight_bytes(pipeline) for pipeline, _ in self._open.values())
        return models + sum(map(upscaler_bytes, self._open_upscalers.values()))

    def _make_room(self, needed: int, kept: Hashable = None) -> None:
        """Let go of upscalers, then of models, asked for longest ago; the last and `kept` stay."""
        while self.budget is not None and self._held + needed > self.budget:
            if len(self._open_upscalers) > 1:
                self._open_upscalers.popitem(last=False)
                continue
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
            steering = [control.net for control in request.controls]
            steering += [prompt.adapter or "" for prompt in request.image_prompts]
            if not steering:
                raise
            log.exception("what steers cannot be drawn with")
            raise unavailable(
                " and ".join(dict.fromkeys(steering)),
                f"cannot steer the model {model}: a graph is missing",
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
