"""From a prompt to images, as it happens: plan, start, step, decode.

Image-to-image changes the starting registers and the first step, nothing else; inpainting adds two
registers and a mask. An adapter changes weights before the first step, nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, cast

from PIL import Image

from engine.adapters.adapter import AdapterChoice
from engine.adapters.choice import as_choice
from engine.adapters.folder import check_folder
from engine.adapters.textual_inversion import read_embedding
from engine.backends.base import Engine
from engine.backends.settings import BackendSettings, ComputePrecision
from engine.devices.device import HostOrDeviceArray
from engine.engines import Engines
from engine.graphs.graph import Part, TextPart
from engine.model import Model, find_model
from runtime.conditioning.encoder import Encoder
from runtime.conditioning.names import named_adapters
from runtime.conditioning.tokenizer import Tokenizer, load_tokenizers
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.device_loop import DeviceLoop
from runtime.denoising.latents import LatentSpace, Progress, State, predicted_x0
from runtime.images import tiles
from runtime.images.canvas import paste_back
from runtime.images.files import SOURCE_KEY
from runtime.images.previews import finite
from runtime.images.upscaling import PIXELS
from runtime.plan import Array, Plan, StepInputs, make_plan
from runtime.request import Request
from runtime.request_options import RequestOptions
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.templates import expand_request, with_templates


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The images, in the order of the prompts, and what each was made with.

    settings: of each image, as `runtime.images.files.write_image` keeps them in a file
    notes: sentences on what the prompts ask for in vain, such as an adapter that is not there
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


class Pipeline:
    """A model with its engines; `load` makes one, a call draws images.

    Engines are opened when they are first needed and kept, until `close`, the end of a `with`, or
    the last reference to the pipeline goes. Calls from several threads are safe as far as the
    backend's engines are, as ONNX Runtime's are, and prompts name the same adapters.

    engines: the engines, with the settings and the precision that were chosen for them
    lora_dir: where adapters are that prompts name, as `<lora:name:0.8>`
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
        self.engines = engines
        self.lora_dir = None if lora_dir is None else check_folder(lora_dir)
        self.wildcards = wildcards
        self._loras: Sequence[AdapterChoice] = ()  # that were given, beside those prompts name
        self._named: Sequence[AdapterChoice] = ()
        self.encoder = Encoder(model=engines.model, tokenizers=tokenizers, engine=engines.engine)
        self.schedule = NoiseSchedule.from_config(engines.model.scheduler)
        self._latents = LatentSpace(model=engines.model, engine=engines.engine)
        self._device_loop = DeviceLoop()

    @classmethod
    def load(
        cls,
        model: str | Path = "pictogram",
        *,
        vae: Path | None = None,
        preview_decoder: Path | None = None,
        loras: Sequence[str | Path | AdapterChoice] = (),
        lora_dir: str | Path | None = None,
        wildcard_dir: str | Path | None = None,
        embeddings: Sequence[Path] = (),
        prediction_type: str | None = None,
        graphs: Path | None = None,
        precision: ComputePrecision | None = None,
        settings: BackendSettings | None = None,
        fast_start: bool = False,
    ) -> Self:
        """Load a model: the one that ships, by its name, a folder or a checkpoint's file.

        vae: a file or folder of another autoencoder, instead of the model's own
        preview_decoder: a file or folder of a tiny decoder such as TAESD's, for `previews`; instead
            of the model's own, if it has one
        loras, embeddings: as `set_loras` and `set_embeddings` take them
        lora_dir: a folder of adapters that prompts may name, as `<lora:name:0.8>`: they are on for
            that call, beside `loras`
        wildcard_dir: a folder of text files whose lines prompts may choose from, as `__name__`
        prediction_type: "epsilon", "v_prediction" or "sample", instead of what the model says
        graphs: a folder that `python -m export` wrote; None looks in the cache and the package.
        precision: what the engines compute in: "float32", "bfloat16" or "int8"
        settings: how engines run; what it and the precision leave open is chosen by the processor
        fast_start: whether a small model's engines should rather open soon than draw many images
            fast
        Raises ModelError, GraphError or BackendError.
        """
        opened = Model.open(
            find_model(model),
            prediction_type=prediction_type,
            vae=vae,
            preview_decoder=preview_decoder,
        )
        engines = Engines.choose(
            opened, graphs=graphs, settings=settings, precision=precision, fast_start=fast_start
        )
        folder = None if lora_dir is None else Path(lora_dir)
        wildcards = None if wildcard_dir is None else Wildcards(Path(wildcard_dir))
        tokenizers = load_tokenizers(opened)
        pipeline = cls(engines, tokenizers, lora_dir=folder, wildcards=wildcards)
        if loras:
            pipeline.set_loras(loras)
        if embeddings:
            pipeline.set_embeddings(embeddings)
        return pipeline

    def __call__(self, prompt: str | Sequence[str], **options: Unpack[RequestOptions]) -> Result:
        """Draw images; `options` are the other fields of `Request`.

        Raises RequestError for an invalid request, BackendError when an engine fails.
        """
        plan = self.plan(Request(prompt=prompt, **cast(dict[str, Any], options)))
        latents: HostOrDeviceArray | None = None
        for run in plan.runs():
            state = self.start(run, latents)
            latents = self._run(run, state)
        assert latents is not None
        images = self.finish(plan, self.decode(latents))
        return Result(images=images, seeds=plan.seeds, settings=plan.settings, notes=plan.notes)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model, compute its sampler and encode its texts.

        Adapters that its prompts name are put on, in place of those that a prompt before named.
        Raises RequestError, ModelError where an adapter does not fit, and BackendError where it
        would not fit into a GPU's memory.
        """
        chosen, notes = request, list[str]()
        if request.is_template:
            chosen, notes = expand_request(request, self.wildcards)
        if self._named or chosen.names_files:
            notes += self._heed_names(chosen)
        plan = make_plan(chosen, self.model, self.schedule, self.encoder)
        plan = plan if chosen is request else with_templates(plan, request)
        plan = replace(plan, notes=notes) if notes else plan
        self.engines.require_memory(self._parts(plan), **_sizes(plan))
        return plan

    def start(self, plan: Plan, latents: HostOrDeviceArray | None = None) -> State:
        """Return the state before a run's first call: noise, or a noised image.

        latents: (B, C, h, w) of the run before, where the plan is a second run
        Every engine that the run needs is open then: what is damaged is found before a step.
        Raises GraphError, ModelError or BackendError.
        """
        self.open_engines(plan)
        return self._latents.start(plan, latents)

    def open_engines(self, plan: Plan) -> None:
        """Open every engine that a plan needs; raises GraphError, ModelError or BackendError."""
        for part in self._parts(plan):
            self.engine(part)

    def step(self, state: State, inputs: StepInputs) -> State:
        """Call the UNet once; returns the state after it, and leaves the one before as it was.

        Each state draws fresh noise once, so step it once. Raises BackendError.
        """
        given = state.inputs(inputs)
        outputs = self.engine(inputs.part).run(given)
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

    def decode(self, latents: HostOrDeviceArray) -> list[Image.Image]:
        """Decode latents (B, C, h, w) into images of 8 h by 8 w pixels."""
        return [Image.fromarray(pixels) for pixels in self._latents.decode(latents)]

    def finish(self, plan: Plan, images: list[Image.Image]) -> list[Image.Image]:
        """Give a plan's decoded images the pixels that are the image's own outside its mask.

        What they are then is in their `info`, where `write_image` looks.
        """
        if plan.mask is not None and plan.image is not None and plan.paste_back:
            images = [paste_back(new, plan.image, plan.mask, plan.mask_blur) for new in images]
        for image in images:
            image.info[SOURCE_KEY] = plan.source_type
        return images

    def previews(self, latents: Array) -> list[Image.Image]:
        """Draw what latents (B, C, h, w) are about to become, by the tiny decoder.

        They are best `Progress.denoised()`. Raises ModelError when there is no tiny decoder.
        """
        run, compression = self.engine("preview_decoder").run, self.model.vae.compression
        return [Image.fromarray(p) for p in tiles.decode(run, finite(latents), compression)]

    def set_loras(self, loras: Sequence[str | Path | AdapterChoice]) -> None:
        """Put these adapters on in place of those that are on; none gives the model itself back.

        loras: each a path, a text "FILE:WEIGHT", or an AdapterChoice. Weights of the model that
        no adapter changes stay bound as they are, the others are computed from the checkpoint
        anew, so what an adapter leaves behind is the base bit for bit.
        Raises ModelError when one does not fit, and then the adapters stay as they were.
        """
        chosen = [as_choice(lora) for lora in loras]
        self._put_on(chosen)
        self._loras, self._named = chosen, ()

    def set_embeddings(self, embeddings: Sequence[Path]) -> None:
        """Teach the text encoders these words of textual inversion in place of others.

        A word is found in a prompt whatever its case. Raises ModelError when a file is none or was
        trained for another text encoder, RequestError when its word is one already.
        """
        if embeddings or self.encoder.extra:
            read = [read_embedding(Path(path)) for path in embeddings]
            self.encoder = self.encoder.with_embeddings(read)

    @property
    def model(self) -> Model:
        """What the model says of itself."""
        return self.engines.model

    @property
    def model_path(self) -> Path:
        """The folder or the file that the model came from."""
        return self.model.path

    def engine(self, part: Part) -> Engine:
        """Return a part's engine, opening it at the first call."""
        return self.engines.engine(part)

    def close(self) -> None:
        """Let go of the engines and of the memory on a device; then nothing can be drawn."""
        self._device_loop.reset()
        self.engines.close()
        self.encoder = self.encoder.without_cache()

    def __enter__(self) -> Self:
        """Return the pipeline, which is closed at the end of the `with`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pipeline."""
        self.close()

    def _put_on(self, adapters: Sequence[AdapterChoice]) -> None:
        self._device_loop.reset()
        self.engines.set_loras(adapters)
        self.encoder = self.encoder.without_cache()

    def _heed_names(self, request: Request) -> list[str]:
        """Put on the adapters that the prompts name; return notes on what they name in vain."""
        named, notes = named_adapters(
            request.prompts if request.prompt_syntax else (),
            request.negative_prompts if request.prompt_syntax else (),
            words=self.encoder.words,
            folder=self.lora_dir,
            given={lora.known_as for lora in self._loras},
        )
        if named != list(self._named):
            self._put_on([*self._loras, *named])
            self._named = named
        return notes

    def _run(self, plan: Plan, state: State) -> HostOrDeviceArray:
        """Make all calls of a run that nobody watches; returns the latents, where they are."""
        if hasattr(self.engine("step"), "device"):
            return self._device_loop.finish(state, plan.steps(), self.engines.engine)
        for inputs in plan.steps():
            state = self.step(state, inputs)
        return state.latents

    def _steps(self, plan: Plan, state: State) -> Iterator[tuple[StepInputs, State]]:
        """Make the calls of a run one by one; yields each with the state after it."""
        if hasattr(self.engine("step"), "device"):
            yield from self._device_loop.steps(state, plan.steps(), self.engines.engine)
            return
        for inputs in plan.steps():
            state = self.step(state, inputs)
            yield inputs, state

    def _parts(self, plan: Plan) -> list[Part]:
        """Return the parts that a plan needs, its second run included."""
        runs, parts = list(plan.runs()), list[Part](["step", "vae_decoder"])
        if not all(is_full for run in runs for is_full in run.full_calls):
            parts.append("step_shallow")
        enlarges = any(run.upscaler == PIXELS for run in runs)
        if plan.image is not None or enlarges or self.model.is_inpainting:
            parts.append("vae_encoder")
        return parts


def _sizes(plan: Plan) -> dict[str, int]:
    """Return the sizes of a plan's largest run, by which the memory of a device is estimated."""
    *_, run = plan.runs()
    contexts = [conditioning["context"].shape for conditioning in run.conditioning]
    return {
        "height": run.height,
        "width": run.width,
        "batch": len(run.seeds),
        "groups": max(shape[0] for shape in contexts),
        "tokens": max(shape[2] for shape in contexts),
        "registers": run.program.matrices.shape[1] + 2 * (run.mask is not None),
        "steps": int(run.program.needs_noise.sum()) + 1,
    }
