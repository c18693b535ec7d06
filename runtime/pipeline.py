"""From a prompt to images, as it happens: plan, start, step, decode.

Image-to-image changes the starting registers and the first step, nothing else; inpainting adds two
registers and a mask. An adapter changes weights before the first step, nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
from PIL import Image

from engine.adapters.choice import AdapterChoice
from engine.backends.settings import BUILT_BEFOREHAND, BackendSettings, ComputePrecision
from engine.devices.device import HostOrDeviceArray, on_host
from engine.engines import Engines
from engine.errors import RequestError
from engine.graphs.graph import TextPart
from engine.model import Model, find_model
from runtime.adapted_model import AdaptedModel
from runtime.checks import OneOrMore, path_of
from runtime.conditioning.tokenizer import Tokenizer, load_tokenizers
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.groups import groups_of
from runtime.denoising.latents import Progress, State, parts_of, predicted_x0
from runtime.denoising.row_loop import finished_rows
from runtime.denoising.rows import rows_of
from runtime.diffusers_arguments import CallArguments, OnStepEnd
from runtime.images.files import SOURCE_KEY, SPACING_KEY, as_floats
from runtime.plan import Array, Plan, StepInputs, make_plan
from runtime.request import Request
from runtime.request_options import CallOptions
from runtime.result import ArrayResult, DrawnImage, Result
from runtime.templates import expand_request, with_templates
from runtime.variants import check_built

OWN = "own"  # as a preview decoder: the model's
SHIPPED = "pictogram"


class Pipeline(AdaptedModel):
    """A model with its engines; `load` makes one, a call draws images.

    Engines are opened when they are first needed and kept, until `close`, the end of a `with`, or
    the last reference to the pipeline goes. Calls from several threads are safe as far as the
    backend's engines are, as ONNX Runtime's are, and prompts name the same adapters.

    engines, lora_dir: as `AdaptedModel` has them
    wildcards: what prompts choose from, as `__name__`
    """

    def __init__(
        self,
        engines: Engines,
        tokenizers: Mapping[TextPart, Tokenizer],
        *,
        lora_dir: Path | None = None,
        wildcards: Wildcards | None = None,
    ) -> None:
        super().__init__(engines, tokenizers, lora_dir=lora_dir)
        self.wildcards = wildcards

    @classmethod
    def load(
        cls,
        model: str | Path = SHIPPED,
        *,
        vae: str | Path | None = None,
        preview_decoder: str | Path | None = None,
        unet: str | Path | None = None,
        text_encoder: str | Path | None = None,
        text_encoder_2: str | Path | None = None,
        loras: OneOrMore[str | Path | AdapterChoice] | None = None,
        lora_dir: str | Path | None = None,
        wildcard_dir: str | Path | None = None,
        embeddings: OneOrMore[str | Path] | None = None,
        controls: Mapping[str, str | Path] | OneOrMore[str | Path] | None = None,
        ip_adapters: Mapping[str, str | Path] | OneOrMore[str | Path] | None = None,
        image_encoder: Mapping[str, str | Path] | str | Path | None = None,
        strict: bool = False,
        prediction_type: str | None = None,
        graphs: str | Path | None = None,
        precision: ComputePrecision | None = None,
        settings: BackendSettings | None = None,
        fast_start: bool = False,
    ) -> Self:
        """Load a model: the one that ships, by its name, a folder or a checkpoint's file.

        vae: a file or folder of another autoencoder, instead of the model's own
        preview_decoder: a file or folder of a tiny decoder such as TAESD's, for `previews`; None
            and "own" take the model's own, if it has one
        unet, text_encoder, text_encoder_2: files or folders of these, instead of the model's own;
            where no model is named, of a UNet and its text encoders with a vae
        loras, embeddings, controls, ip_adapters, image_encoder, strict: as `set_loras`,
            `set_embeddings`, `set_controls`, `set_ip_adapters` take them
        lora_dir: a folder of adapters that prompts may name, as `<lora:name:0.8>`: they are on for
            that call, beside `loras`
        wildcard_dir: a folder of text files whose lines prompts may choose from, as `__name__`
        prediction_type: "epsilon", "v_prediction" or "sample", instead of what the model says
        graphs: a folder that `python -m export` wrote; None looks in the cache and the package.
        precision: what the engines compute in: "float32", "bfloat16" or "int8"
        settings: how engines run; what it and the precision leave open is chosen by the processor
        fast_start: whether a small model should rather open soon than draw many images fast
        Raises ModelError, GraphError or BackendError.
        """
        whole = model if unet is None or model != SHIPPED else unet
        opened = Model.open(
            find_model(whole),
            prediction_type=prediction_type,
            vae=path_of(vae),
            preview_decoder=None if preview_decoder == OWN else path_of(preview_decoder),
            unet=path_of(unet),
            text_encoder=path_of(text_encoder),
            text_encoder_2=path_of(text_encoder_2),
        )
        engines = Engines.choose(
            opened,
            graphs=path_of(graphs),
            settings=settings,
            precision=precision,
            fast_start=fast_start,
        )
        folder = None if lora_dir is None else Path(lora_dir)
        wildcards = None if wildcard_dir is None else Wildcards(Path(wildcard_dir))
        tokenizers = load_tokenizers(opened)
        pipeline = cls(engines, tokenizers, lora_dir=folder, wildcards=wildcards)
        if loras:
            pipeline.set_loras(loras, strict=strict)
        if embeddings:
            pipeline.set_embeddings(embeddings)
        if controls:
            pipeline.set_controls(controls)
        if ip_adapters:
            pipeline.set_ip_adapters(ip_adapters, image_encoder)
        return pipeline

    def __call__(
        self, prompt: str | Sequence[str] | None = None, **options: Unpack[CallOptions]
    ) -> Result | ArrayResult:
        """Draw images, in `groups`.

        options: the other fields of `Request`, and diffusers' arguments that are none of these
            (docs/from-diffusers.md); with callback_on_step_end all images are one group
        Raises RequestError for an invalid request, BackendError when an engine fails.
        """
        call = CallArguments.read(prompt, cast(dict[str, Any], options))
        plan = self.plan(call.request)
        plan = call.applied(plan, self._latents.shape(plan))
        groups = [plan] if call.on_step_end else self.groups(plan)
        drawn = [self._draw(group, call.on_step_end) for group in groups]
        if call.output_type == "latent":
            latents = np.concatenate([on_host(found) for found in drawn])
            return ArrayResult.of(latents[: len(plan.seeds)], plan)  # less repeats at the end
        images = [
            image
            for group, latents in zip(groups, drawn, strict=True)
            for image in self.finish(group, self.decode(latents, group))
        ]
        if call.output_type == "np":
            return ArrayResult.of(np.stack([as_floats(image) for image in images]), plan)
        notes = (*self.notes, *plan.notes)
        return Result(images=images, seeds=plan.seeds, settings=plan.settings, notes=notes)

    def draw(
        self, requests: Sequence[Request], *, batch_size: int | None = None
    ) -> Iterator[DrawnImage]:
        """Draw unlike requests in shared calls of the UNet; yields each image as it is finished.

        Those that fit together share a call: of one size, with prompts of one length. On ONNX
        Runtime in float32 every image is what it is alone, bit for bit.
        batch_size: images of a call, as `groups` takes it; None takes up to 4, on OpenVINO one
        Raises what a call of the pipeline does: RequestError first of all.
        """
        for _, alike in groupby(enumerate(requests), lambda each: each[1].adapters):
            plans, named = dict[int, Plan](), set[tuple[AdapterChoice, ...]]()
            for index, request in alike:
                plans[index] = self.plan(request)
                named.add(tuple(self._named))
            if len(named) > 1:
                raise RequestError(
                    "alternatives in the prompts choose different adapters, which the pictures of "
                    "a call share; draw them one after the other"
                )
            most = min((self.batch_limit(plan, batch_size) for plan in plans.values()), default=1)
            rows = {row: index for index, plan in plans.items() for row in rows_of(plan)}
            limit, is_exact = dict.fromkeys(rows, most).__getitem__, self.engines.is_exact
            for row in finished_rows(
                list(rows), self.step_rows, self.start, limit, is_exact=is_exact
            ):
                (image,) = self.finish(row.plan, self.decode(row.latents, row.plan))
                (settings,) = row.plan.settings
                notes = row.plan.notes
                yield DrawnImage(image=image, request=rows[row], settings=settings, notes=notes)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model, compute its sampler and encode its texts.

        Adapters that its prompts name are put on, in place of those that a prompt before named.
        Raises RequestError, ModelError where an adapter does not fit, and BackendError where one
        picture of it would not fit into a GPU's memory.
        """
        if (backend := self.engines.settings.backend) in BUILT_BEFOREHAND:
            check_built(request, self.model, backend)
        if is_steered := bool(request.controls or request.image_prompts):
            request = self._steering.completed(request)
        chosen, notes = request, list[str]()
        if request.is_template:
            chosen, notes = expand_request(request, self.wildcards)
        if self._named or chosen.names_files:
            notes += self._heed_names(chosen)
        plan = make_plan(chosen, self._distilled, self.schedule, self.encoder)
        plan = self._steering.steered(plan, request) if is_steered else plan
        plan = plan if chosen is request else with_templates(plan, request)
        plan = replace(plan, notes=[*notes, *plan.notes]) if notes else plan
        self._require_memory(plan, 1)
        return plan

    def groups(self, plan: Plan, batch_size: int | None = None) -> list[Plan]:
        """Return a plan's pictures as plans to draw one after the other, for less memory.

        batch_size: pictures of each: at most where they are the same bits in every group, and
            exactly elsewhere, by repeats that `finish` drops; None takes what memory and gain
            allow, on OpenVINO one
        Raises RequestError for a size that is none.
        """
        if len(plan.seeds) == 1 and batch_size is None:
            return [plan]
        return groups_of(
            plan,
            self.batch_limit(plan, batch_size),
            is_exact=self.engines.is_exact,
            is_filled=batch_size is not None,
        )

    def start(self, plan: Plan, latents: HostOrDeviceArray | None = None) -> State:
        """Return the state before a run's first call: noise, or a noised image.

        latents: (B, C, h, w) of the run before, where the plan is a second run
        Every engine that the run needs is open then: what is damaged is found before a step.
        Raises GraphError, ModelError or BackendError.
        """
        self.open_engines(plan)
        state = self._latents.start(plan, latents)
        is_steered = plan.controls or plan.image_prompts
        return self._steering.begun(state, plan) if is_steered else state

    def open_engines(self, plan: Plan) -> None:
        """Open every engine that a plan needs; raises GraphError, ModelError or BackendError."""
        self._latents.open_upscalers(plan)
        for part in parts_of(plan, self.model):
            self.engine(part, plan.variants.get(part))
        if plan.controls or plan.image_prompts:
            self._steering.open(plan)

    def step(self, state: State, inputs: StepInputs) -> State:
        """Call the UNet once; returns the state after it, and leaves the one before as it was.

        Each state draws fresh noise once, so step it once. Raises BackendError.
        """
        given = state.inputs(inputs)
        if inputs.is_steered:
            given |= self._steering.added(inputs, state, given)
        outputs = self.engine(inputs.part, inputs.variant).run(given)
        return state.after(outputs, given)

    def denoise(self, plan: Plan) -> Iterator[Progress]:
        """Run a plan's sampler; yields after every call of the UNet. To cancel, stop iterating."""
        done, total, latents = 0, plan.calls, None
        for run in plan.runs():
            for inputs, state in self._steps(run, self.start(run, latents)):
                done += 1
                yield Progress(
                    step=done,
                    total=total,
                    denoised=partial(predicted_x0, self.schedule, inputs, state),
                    state=state,
                )
            latents = state.latents if run.hires is not None else None

    def finish(self, plan: Plan, images: list[Image.Image]) -> list[Image.Image]:
        """Bring a plan's decoded images to its image's size, with its own pixels outside the mask.

        What they are then is in their `info`, where `write_image` looks. Repeats are dropped.
        """
        images = images[: len(images) - plan.surplus]
        if plan.frame is not None:
            blur = plan.mask_blur if plan.paste_back else None
            images = [plan.frame.restore(image, blur) for image in images]
        for image in images:
            image.info[SOURCE_KEY] = plan.source_type
            image.info[SPACING_KEY] = self.schedule.timestep_spacing
        return images

    def _draw(self, plan: Plan, on_step_end: OnStepEnd | None = None) -> HostOrDeviceArray:
        """Make all calls of a plan; returns the latents."""
        latents: HostOrDeviceArray | None = None
        for run in plan.runs():
            state = self.start(run, latents)
            if on_step_end is None:
                latents = self._run(run, state)
            else:
                latents = self._watched_run(run, state, on_step_end)
        assert latents is not None
        return latents

    def _watched_run(self, plan: Plan, state: State, on_step_end: OnStepEnd) -> Array:
        """Make the calls of a run; who watches may change the latents, or set `_interrupt`."""
        self._interrupt = False
        for step, inputs in enumerate(plan.steps()):
            state = self.step(state, inputs)
            now = {"latents": state.latents}
            state = state.changed(on_step_end(self, step, plan.program.timesteps[step], now))
            if self._interrupt:
                break
        return state.latents

    def _run(self, plan: Plan, state: State) -> HostOrDeviceArray:
        """Make all calls of a run that nobody watches; returns the latents, where they are."""
        if self._is_on_device(plan):
            nets = self._controlled(plan)
            return self._device_loop.finish(state, plan.steps(), self.engines.engine, nets)
        for inputs in plan.steps():
            state = self.step(state, inputs)
        return state.latents

    def _steps(self, plan: Plan, state: State) -> Iterator[tuple[StepInputs, State]]:
        """Make the calls of a run one by one; yields each with the state after it."""
        if self._is_on_device(plan):
            nets = self._controlled(plan)
            yield from self._device_loop.steps(state, plan.steps(), self.engines.engine, nets)
            return
        for inputs in plan.steps():
            state = self.step(state, inputs)
            yield inputs, state
