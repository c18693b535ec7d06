"""A model with its engines, and what is put on it: adapters, words, and those that prompts name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from PIL import Image

from engine.adapters.choice import AdapterChoice
from engine.adapters.folder import check_folder
from engine.backends.base import DeviceEngine, Engine
from engine.backends.settings import ON_GPU
from engine.devices.device import DeviceArray, HostOrDeviceArray, within_memory
from engine.engines import Engines
from engine.errors import ModelError
from engine.graphs.graph import Part, TextPart
from engine.graphs.variants import Variant
from engine.model import Model
from runtime.checks import OneOrMore, path_of, several
from runtime.conditioning.encoder import Encoder
from runtime.conditioning.names import named_adapters
from runtime.conditioning.tokenizer import Tokenizer
from runtime.denoising.groups import batch_limit
from runtime.denoising.latents import LatentSpace, parts_of, sizes_of
from runtime.denoising.rows import Row, step_rows
from runtime.images import tiles
from runtime.images.previews import finite
from runtime.plan import Array, Plan
from runtime.request import Request
from runtime.samplers.noise_schedule import NoiseSchedule

# What a plain prompt has no use for is imported where it is used: it would be a third of all that
# a process reads before its first picture.
if TYPE_CHECKING:
    from engine.adapters.adapter import Adapter
    from engine.adapters.textual_inversion import Embedding
    from engine.steering.control_nets import ControlNets
    from engine.steering.ip_adapters import IPAdapters
    from runtime.denoising.controls import ControlledSteps
    from runtime.denoising.device_loop import DeviceLoop
    from runtime.denoising.device_rows import DeviceRows
    from runtime.images.upscaler import Upscaler
    from runtime.steering import Steering


class AdaptedModel:
    """A model's engines and text encoders, with the adapters and the words that are on.

    engines: the engines, with the settings and the precision that were chosen for them
    lora_dir: where adapters are that prompts name, as `<lora:name:0.8>`
    """

    def __init__(
        self,
        engines: Engines,
        tokenizers: Mapping[TextPart, Tokenizer],
        *,
        lora_dir: Path | None = None,
    ) -> None:
        self.engines = engines
        self.lora_dir = None if lora_dir is None else check_folder(lora_dir)
        self.encoder = Encoder(model=engines.model, tokenizers=tokenizers, engine=engines.engine)
        self.schedule = NoiseSchedule.from_config(engines.model.scheduler)
        self._distilled = engines.model  # as its adapters distil it, where they do
        self._few_steps = ""
        self._latents = LatentSpace(
            model=engines.model, engine=engines.engine, threads=engines.settings.threads
        )
        # The adapters that were given, beside those that prompts name, and the words they bring.
        self._loras: Sequence[tuple[Adapter, AdapterChoice]] = ()
        self._named: Sequence[AdapterChoice] = ()
        self._embeddings: list[Embedding] = []
        self._bundled: list[Embedding] = []

    def set_loras(
        self,
        loras: OneOrMore[str | Path | AdapterChoice] | None,
        *,
        strict: bool = False,
    ) -> None:
        """Put these adapters on in place of those that are on; none gives the model itself back.

        loras: one or several, each a path, a text "FILE:WEIGHT", or an AdapterChoice. Weights that
        no adapter changes stay bound as they are, the others are computed from the checkpoint
        anew, so what an adapter leaves behind is the base bit for bit. Words that one brings are
        known with it, and one that distils to few steps says what is drawn with by default.
        strict: whether every module must fit the model, and not only half of them
        Raises ModelError when one does not fit, and then the adapters stay as they were.
        """
        from engine.adapters.adapter import read_adapters

        chosen: Sequence[str | Path | AdapterChoice] = several(loras)
        adapters = read_adapters(chosen, strict=strict)
        self._put_on(adapters)
        self._loras, self._named = adapters, ()

    def set_embeddings(self, embeddings: OneOrMore[str | Path] | None) -> None:
        """Teach the text encoders these words of textual inversion in place of others.

        A word is the file's name and what the file states, or WORD of "FILE=WORD". It is found in
        a prompt whatever its case. Of XL's, two files may each hold a half. Raises ModelError when
        a file is none or was trained for another text encoder, RequestError when two have a word.
        """
        files: Sequence[str | Path] = several(embeddings)
        if files or self.encoder.extra:
            from engine.adapters.textual_inversion import read_embedding

            read = [read_embedding(path) for path in files]
            self.encoder = self.encoder.with_embeddings([*read, *self._bundled])
            self._embeddings = read

    def set_controls(
        self, controls: Mapping[str, str | Path] | OneOrMore[str | Path] | None
    ) -> None:
        """Make these ControlNets and T2I-Adapters known to requests in place of others.

        None is drawn with by this.

        controls: files or folders by the names that a `Control` gives, or files alone, whose names
        without their endings these are. One that stays keeps its engines, and a request that turns
        it on or off or weighs it otherwise opens none. Raises ModelError for what is neither or
        is one of another family, BackendError for a backend whose engines are built beforehand.
        """
        self._forget_forms()
        self.control_nets.set(_by_name("ControlNets", controls))

    def set_ip_adapters(
        self,
        ip_adapters: Mapping[str, str | Path] | OneOrMore[str | Path] | None,
        image_encoder: Mapping[str, str | Path] | str | Path | None = None,
    ) -> None:
        """Make these IP-Adapters known to requests in place of others, as `set_controls` does.

        image_encoder: the folder of the image encoder that they see pictures through, or one for
            each by the adapters' names; None for image_encoder/ beside each or in the model's
            folder
        Raises ModelError for what is no IP-Adapter, or is one of another family or encoder,
        BackendError for a backend whose engines are built beforehand.
        """
        encoders = (
            path_of(image_encoder)
            if not isinstance(image_encoder, Mapping)
            else {name: path_of(folder) for name, folder in image_encoder.items()}
        )
        self._steering.set_ip_adapters(_by_name("IP-Adapters", ip_adapters), encoders)

    @property
    def control_nets(self) -> "ControlNets":
        """The ControlNets and T2I-Adapters that requests may name."""
        return self._steering.control_nets

    @property
    def ip_adapters(self) -> "IPAdapters":
        """The IP-Adapters that requests may name."""
        return self._steering.ip_adapters

    def share_upscalers(self, upscalers: "dict[str, Upscaler]") -> None:
        """Take hires fix's trained upscalers from a dictionary by paths, and put new ones there."""
        self._latents = replace(self._latents, upscalers=upscalers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was concluded of the files, and what of them is not used, a sentence each."""
        added = (*self.engines.adapter_notes, *self.encoder.notes)
        return (*self.model.notes, *added, *filter(None, [self._few_steps]))

    @property
    def model(self) -> Model:
        """What the model says of itself."""
        return self.engines.model

    @property
    def model_path(self) -> Path:
        """The folder or the file that the model came from."""
        return self.model.path

    def engine(self, part: Part, variant: Variant | None = None) -> Engine:
        """Return a part's engine, or that of a variant of it, opening it at the first call."""
        return self.engines.engine(part, variant)

    def previews(self, latents: Array) -> list[Image.Image]:
        """Draw what latents (B, C, h, w) are about to become, by the tiny decoder.

        They are best `Progress.denoised()`. Raises ModelError when there is no tiny decoder.
        """
        run, compression = self.engine("preview_decoder").run, self.model.vae.compression
        return [Image.fromarray(p) for p in tiles.decode(run, finite(latents), compression)]

    def decode(self, latents: HostOrDeviceArray, plan: Plan | None = None) -> list[Image.Image]:
        """Decode latents (B, C, h, w) into images of 8 h by 8 w pixels; plan: whose they are."""
        space = self._latents
        if plan is not None and plan.seamless:
            space = replace(space, seamless=plan.seamless)
        decode = partial(space.decode, latents)
        on_device = isinstance(latents, DeviceArray)
        decoded = within_memory(decode, self._forget_forms) if on_device else decode()
        return [Image.fromarray(pixels) for pixels in decoded]

    def batch_limit(self, plan: Plan, batch_size: int | None = None) -> int:
        """Return how many of a plan's pictures are drawn at once; as `Pipeline.groups` takes it."""
        parts, sizes = parts_of(plan, self.model), sizes_of(plan)
        fits = partial(self._require_memory, plan)
        return batch_limit(self.engines, parts, sizes, fits, batch_size)

    def step_rows(self, rows: Sequence[Row], *, filled_to: int = 0) -> None:
        """Make the next call of rows of one bucket together, on a device where engines live there.

        filled_to: rows that the call has at least, by repeats
        Raises BackendError, and then every row is where it was.
        """
        engine = self.engine(rows[0].part, rows[0].variant)
        if isinstance(engine, DeviceEngine) and engine.device.has_addresses:
            is_steered = rows[0].next_step.is_steered
            controlled = self._steering.controlled if is_steered else None
            self._device_rows.step(rows, engine, filled_to=filled_to, controlled=controlled)
        else:
            step_rows(
                rows,
                self.engine,
                filled_to=filled_to,
                residuals=lambda *of_calls: self._steering.controlled.added(*of_calls),
            )

    def close(self) -> None:
        """Let go of the engines and of the memory on a device; then nothing can be drawn."""
        self._forget_forms()
        self.engines.close()
        if "_steering" in vars(self):
            self._steering.close()
        self.encoder = self.encoder.without_cache()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied, with what to do instead."""
        raise TypeError(
            "a pipeline's engines cannot be pickled or copied; load one in each process by "
            f"Pipeline.load({str(self.model_path)!r}), or share one between threads"
        )

    def __enter__(self) -> Self:
        """Return the pipeline, which is closed at the end of the `with`."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the pipeline."""
        self.close()

    @cached_property
    def _steering(self) -> "Steering":
        from runtime.steering import Steering

        return Steering(self.engines)

    @cached_property
    def _device_loop(self) -> "DeviceLoop":
        from runtime.denoising.device_loop import DeviceLoop

        return DeviceLoop()

    @cached_property
    def _device_rows(self) -> "DeviceRows":
        from runtime.denoising.device_rows import DeviceRows

        return DeviceRows()

    def _forget_forms(self) -> None:
        """Let go of what is kept on a device for runs of forms that may come again, if anything."""
        for made in ("_device_loop", "_device_rows"):
            if made in vars(self):
                getattr(self, made).reset()

    def _is_on_device(self, plan: Plan) -> bool:
        part = plan.step_parts[0]
        return hasattr(self.engine(part, plan.variants.get(part)), "device")

    def _require_memory(self, plan: Plan, pictures: int) -> None:
        """Raise BackendError where so many of a plan's pictures do not fit into a GPU's memory."""
        if self.engines.settings.backend not in ON_GPU:
            return
        beside = self._steering.needed(plan) if plan.controls or plan.image_prompts else {}
        sizes, parts = {**sizes_of(plan), "batch": pictures}, parts_of(plan, self.model)
        self.engines.require_memory(parts, plan.variants, beside, **sizes)

    def _controlled(self, plan: Plan) -> "ControlledSteps | None":
        """Return the nets beside the UNet where they steer a plan."""
        return self._steering.controlled if plan.controls else None

    def _put_on(self, adapters: "Sequence[tuple[Adapter, AdapterChoice]]") -> None:
        from engine.adapters.few_steps import with_few_steps

        bundled = [embedding for adapter, _ in adapters for embedding in adapter.embeddings]
        encoder = self.encoder.without_cache()
        if bundled or self._bundled:
            encoder = encoder.with_embeddings([*self._embeddings, *bundled])
        self._forget_forms()
        self.engines.set_loras(adapters)
        self.encoder, self._bundled = encoder, bundled
        choices = [choice for _, choice in adapters]
        self._distilled, self._few_steps = with_few_steps(self.model, choices)
        self.schedule = NoiseSchedule.from_config(self._distilled.scheduler)

    def _heed_names(self, request: Request) -> list[str]:
        """Put on the adapters that the prompts name; return notes on what they name in vain."""
        named, notes = self._names_in(request)
        if named != list(self._named):
            from engine.adapters.adapter import read_adapters

            self._put_on([*self._loras, *read_adapters(named)])
            self._named = named
            _, notes = self._names_in(request)  # they may have brought words
        return notes

    def _names_in(self, request: Request) -> tuple[list[AdapterChoice], list[str]]:
        return named_adapters(
            request.prompts if request.prompt_syntax else (),
            request.negative_prompts if request.prompt_syntax else (),
            words=self.encoder.words,
            folder=self.lora_dir,
            given={choice.known_as for _, choice in self._loras},
        )


def _by_name(
    what: str, given: Mapping[str, str | Path] | OneOrMore[str | Path] | None
) -> dict[str, Path]:
    """Return files by their names: those that are given, or the files' without their endings.

    what: they are; raises ModelError where two have one name.
    """
    if isinstance(given, Mapping):
        return {name: Path(path) for name, path in given.items()}
    listed: Sequence[str | Path] = several(given)
    files = [Path(path) for path in listed]
    named = {path.stem if path.is_file() else path.name: path for path in files}
    if len(named) < len(files):
        raise ModelError(
            f'two {what} have one name; give them others, as {{"canny": "canny.safetensors"}}'
        )
    return named
