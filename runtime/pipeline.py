"""From a prompt to pictures: tokenise, encode, draw noise, step, decode.

Image-to-image changes the starting registers and the first step, nothing else; inpainting adds two
registers and a mask. An adapter changes weights before the first step, nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from engine.adapters.adapter import AdapterChoice
from engine.adapters.textual_inversion import read_embedding
from engine.backends.base import Arrays, BackendSettings, ComputePrecision, Engine
from engine.devices.device import Held
from engine.engines import Opener
from engine.graphs.signature import Part, TextPart
from engine.loaded import LoadedModel
from engine.model import Model
from engine.shipped import find_model
from runtime.conditioning.encoder import Encoder
from runtime.conditioning.tokenizer import Tokenizer, load_tokenizers
from runtime.denoising.denoiser import Denoiser, Progress
from runtime.images import tiles
from runtime.images.canvas import paste_back
from runtime.images.previews import finite
from runtime.images.upscaling import PIXELS
from runtime.plan import Array, Plan, make_plan
from runtime.request import Request
from runtime.samplers.noise_schedule import NoiseSchedule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The pictures, in the order of the prompts, and what each was made with.

    settings: of each picture, as `runtime.images.files.write_image` keeps them in a file
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: Sequence[Mapping[str, Any]]


class Pipeline:
    """A model with its engines; `load` makes one, a call draws pictures.

    Engines are opened when they are first needed and kept. Calls from several threads are safe
    as far as the backend's engines are; ONNX Runtime's are.
    """

    def __init__(
        self,
        model: Model,
        tokenizers: Mapping[TextPart, Tokenizer],
        open_part: Callable[[Part, Arrays], Engine],
    ) -> None:
        self.opener: Opener | None = None  # what `load` chose
        self._loaded = LoadedModel(model, open_part)
        self.encoder = Encoder(model=model, tokenizers=tokenizers, engine=self.engine)
        self.schedule = NoiseSchedule.from_config(model.scheduler)
        self._denoiser = Denoiser(model=model, schedule=self.schedule, engine=self.engine)

    @classmethod
    def load(
        cls,
        model: str | Path = "pictogram",
        *,
        vae: Path | None = None,
        preview_decoder: Path | None = None,
        loras: Sequence[str | Path | AdapterChoice] = (),
        embeddings: Sequence[Path] = (),
        prediction_type: str | None = None,
        graphs: Path | None = None,
        precision: ComputePrecision | None = None,
        settings: BackendSettings | None = None,
        soon: bool = False,
    ) -> Self:
        """Load a model: the one that ships, by its name, a folder or a checkpoint's file.

        vae: a file or folder of another autoencoder, instead of the model's own
        preview_decoder: a file or folder of a tiny decoder such as TAESD's, for `previews`; instead
            of the model's own, if it has one
        loras, embeddings: as `set_loras` and `set_embeddings` take them
        prediction_type: "epsilon", "v_prediction" or "sample", instead of what the model says
        graphs: a folder that `python -m export` wrote; None looks in the cache and the package.
        precision: what the engines compute in: "float32", "bfloat16" or "int8"
        settings: how engines run; what it and the precision leave open is chosen by the processor
        soon: whether a small model's engines should rather open soon than draw many pictures fast
        Raises ModelError, GraphError or BackendError.
        """
        opened = Model.open(
            find_model(model),
            prediction_type=prediction_type,
            vae=vae,
            preview_decoder=preview_decoder,
        )
        opener = Opener.choose(
            opened, graphs=graphs, settings=settings, precision=precision, soon=soon
        )
        pipeline = cls(opened, load_tokenizers(opened), opener)
        pipeline.opener = opener
        pipeline.set_loras(loras)
        pipeline.set_embeddings(embeddings)
        return pipeline

    def set_loras(self, loras: Sequence[str | Path | AdapterChoice]) -> None:
        """Put these adapters on in place of those that are on; none gives the model itself back.

        loras: each a path, a text "FILE:WEIGHT", or an AdapterChoice. Weights of the model that
        no adapter changes stay bound as they are, the others are computed from the checkpoint
        anew, so what an adapter leaves behind is the base bit for bit.
        Raises ModelError when one does not fit, and then the adapters stay as they were.
        """
        self._denoiser.device_loop.forget()
        self._loaded.set_loras(loras)
        self.encoder = self.encoder.forgetful()

    def set_embeddings(self, embeddings: Sequence[Path]) -> None:
        """Teach the text encoders these words of textual inversion in place of others.

        A word is found in a prompt whatever its case. Raises ModelError when a file is none or was
        trained for another text encoder, RequestError when its word is one already.
        """
        if embeddings or self.encoder.extra:
            self.encoder = self.encoder.taught([read_embedding(Path(path)) for path in embeddings])

    @property
    def model(self) -> Model:
        """What the model says of itself."""
        return self._loaded.model

    @property
    def engines(self) -> dict[Part, Engine]:
        """The engines that are open."""
        return self._loaded.engines

    @property
    def model_path(self) -> Path:
        """The folder or the file that the model came from."""
        return self.model.path

    def engine(self, part: Part) -> Engine:
        """Return a part's engine, opening it at the first call."""
        return self._loaded.engine(part)

    def __call__(self, prompt: str | Sequence[str], **wishes: Any) -> Result:
        """Draw pictures; `wishes` are the other fields of `Request`.

        Raises RequestError for a wish that cannot be fulfilled, BackendError when an engine fails.
        """
        plan = self.plan(Request(prompt=prompt, **wishes))
        pictures = self.pictures(plan, self._denoiser.finish(plan))
        return Result(images=pictures, seeds=plan.seeds, settings=plan.settings)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model, compute its sampler and encode its texts.

        Every engine that the request needs is open then: what is damaged is found before a step.
        """
        plan = make_plan(request, self.model, self.schedule, self.encoder)
        parts: list[Part] = ["step", "vae_decoder"]
        if not all(whole for run in plan.runs() for whole in run.whole):
            parts.append("step_shallow")
        if plan.image is not None or plan.upscaler == PIXELS or self.model.is_inpainting:
            parts.append("vae_encoder")
        if self.opener:
            self.opener.require_memory(
                parts, [p for p in parts if p in self.engines], **_sizes(plan)
            )
        for part in parts:
            self.engine(part)
        return plan

    def denoise(self, plan: Plan) -> Iterator[Progress]:
        """Run the sampler; yields after every call of the UNet. To cancel, stop iterating."""
        return self._denoiser.run(plan)

    def decode(self, latents: Held) -> list[Image.Image]:
        """Decode latents (B, C, h, w) into pictures of 8 h by 8 w pixels."""
        return [Image.fromarray(pixels) for pixels in self._denoiser.decode(latents)]

    def previews(self, latents: Array) -> list[Image.Image]:
        """Draw what latents (B, C, h, w) are about to become, by the tiny decoder.

        They are best `Progress.denoised()`. Raises ModelError when there is no tiny decoder.
        """
        run, compression = self.engine("preview_decoder").run, self.model.vae.compression
        return [Image.fromarray(p) for p in tiles.decode(run, finite(latents), compression)]

    def pictures(self, plan: Plan, latents: Held) -> list[Image.Image]:
        """Decode a plan's finished latents; outside its mask the image's own pixels come back."""
        pictures = self.decode(latents)
        if plan.mask is None or plan.image is None or plan.mask_blur is None:
            return pictures
        return [paste_back(new, plan.image, plan.mask, plan.mask_blur) for new in pictures]


def _sizes(plan: Plan) -> dict[str, int]:
    """Return the sizes of a plan's largest run, by which the memory of a device is estimated."""
    *_, run = plan.runs()
    contexts = [told["context"].shape for told in run.conditioning]
    return {
        "height": run.height,
        "width": run.width,
        "batch": len(run.seeds),
        "groups": max(shape[0] for shape in contexts),
        "tokens": max(shape[2] for shape in contexts),
        "registers": run.program.matrices.shape[1] + 2 * (run.mask is not None),
        "steps": int(run.program.needs_noise.sum()) + 1,
    }
