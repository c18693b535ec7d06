"""From a prompt to pictures: tokenise, encode, draw noise, step, decode.

Image-to-image changes the starting registers and the first step, nothing else. An adapter changes
weights before the first step, nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.adapters.adapter import AdapterChoice
from engine.adapters.textual_inversion import read_embedding
from engine.backends import Arrays, BackendSettings, Engine, open_engine
from engine.graphs import Precision, find_graph, graph_folders
from engine.loaded import LoadedModel
from engine.model import Model
from engine.models import find_model
from engine.signature import Part, TextPart
from runtime.conditioning import Encoder, Texts
from runtime.images import as_rgb
from runtime.noise import TorchNoise
from runtime.plan import Array, Plan, Progress, Result
from runtime.prompt import escape
from runtime.request import Request
from runtime.samplers import program
from runtime.schedule import NoiseSchedule
from runtime.tokenizer import Tokenizer, load_tokenizers

STEPS, GUIDANCE_SCALE = 20, 5.0  # of a model that recommends none
GRAY = 128


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
        self._loaded = LoadedModel(model, open_part)
        self.encoder = Encoder(model=model, tokenizers=tokenizers, engine=self.engine)
        self.schedule = NoiseSchedule.from_config(model.scheduler)

    @classmethod
    def load(
        cls,
        model: str | Path = "pictogram",
        *,
        vae: Path | None = None,
        loras: Sequence[str | Path | AdapterChoice] = (),
        embeddings: Sequence[Path] = (),
        prediction_type: str | None = None,
        graphs: Path | None = None,
        precision: Precision = "float32",
        settings: BackendSettings | None = None,
    ) -> Self:
        """Load a model: the one that ships, by its name, a folder or a checkpoint's file.

        vae: a file or folder of another autoencoder, instead of the model's own
        loras, embeddings: as `set_loras` and `set_embeddings` take them
        prediction_type: "epsilon", "v_prediction" or "sample", instead of what the model says
        graphs: a folder that `python -m export` wrote; None looks in the cache and the package.
        Raises ModelError, GraphError or BackendError.
        """
        opened = Model.open(find_model(model), prediction_type=prediction_type, vae=vae)
        chosen = settings or BackendSettings()

        def open_part(part: Part, weights: Arrays) -> Engine:
            config, folders = opened.config(part), graph_folders(graphs)
            graph = find_graph(part, config, precision, folders, opened.path)
            return open_engine(graph, weights, chosen)

        pipeline = cls(opened, load_tokenizers(opened), open_part)
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

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str = "ddim",
        schedule: str | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        eta: float = 0.0,
        prompt_syntax: bool = True,
        clip_skip: int = 1,
    ) -> Result:
        """Draw pictures; the arguments are those of `Request`.

        Raises RequestError for a wish that cannot be fulfilled, BackendError when an engine fails.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            schedule=schedule,
            height=height,
            width=width,
            seed=seed,
            image=image,
            strength=strength,
            eta=eta,
            prompt_syntax=prompt_syntax,
            clip_skip=clip_skip,
        )
        plan = self.plan(request)
        for progress in self.denoise(plan):
            latents = progress.latents
        return Result(images=self.decode(latents), seeds=plan.seeds, warnings=plan.warnings)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model, compute its sampler and encode its texts.

        Every engine that the request needs is open then: what is damaged is found before a step.
        """
        model, compression = self.model, self.model.vae.compression
        height, width = request.size(model.sample_size * compression, compression)
        num_steps = request.num_inference_steps
        if num_steps is None:
            num_steps = model.steps or STEPS
        scale = request.guidance_scale
        if scale is None:
            scale = model.guidance_scale or GUIDANCE_SCALE
        steps = program(
            request.sampler,
            self.schedule,
            int(num_steps),
            schedule=request.schedule,
            strength=None if request.image is None else request.strength,
            eta=request.eta,
        )
        groups, weights = [request.prompts()], [1.0]
        if scale > 1 and not model.unet.time_cond_proj_dim:  # such a model is told the scale
            groups, weights = [request.negative_prompts(), *groups], [1.0 - scale, scale]
        if not request.prompt_syntax:
            groups = [[escape(text) for text in group] for group in groups]
        texts = Texts(groups=groups, weights=weights, repeats=request.num_images_per_prompt)
        for part in self._parts(request):
            self.engine(part)
        conditioning = self.encoder.condition(
            texts,
            height,
            width,
            scale,
            steps=len(steps.timesteps),
            clip_skip=request.clip_skip,
        )
        return Plan(
            program=steps,
            conditioning=conditioning.inputs,
            num_inference_steps=int(num_steps),
            guidance_scale=scale,
            seeds=request.seeds(),
            height=height,
            width=width,
            image=request.image,
            warnings=(),
            changes=conditioning.changes,
        )

    def denoise(self, plan: Plan) -> Iterator[Progress]:
        """Run the sampler; yields after every step. To cancel, stop iterating."""
        steps, batch = plan.program, len(plan.seeds)
        noises = [TorchNoise(seed) for seed in plan.seeds]
        shape = self._latent_shape(plan)
        engine = self.engine("step")
        registers = np.zeros((batch, steps.matrices.shape[1], *shape), np.float32)
        registers[:, 0] = self._start(plan, noises, shape)
        constant = {**plan.conditioning, **self._masked(plan, noises, shape)}
        no_noise = np.zeros((batch, *shape), np.float32)
        total = len(steps.timesteps)
        for i in range(total):
            constant |= plan.changes.get(i, {})
            draws = steps.needs_noise[i]
            inputs: dict[str, NDArray[Any]] = {
                **constant,
                "registers": registers,
                "matrices": _rows(steps.matrices[i], batch),
                "timestep": _rows(steps.timesteps[i], batch),
                "input_scale": _rows(steps.input_scales[i], batch),
                "noise": _draw(noises, shape) if draws else no_noise,
            }
            registers = engine.run(inputs)["next_registers"]
            yield Progress(step=i + 1, total=total, latents=registers[:, 0])

    def decode(self, latents: Array) -> list[Image.Image]:
        """Decode latents (B, C, h, w) into pictures of 8 h by 8 w pixels."""
        pixels = self.engine("vae_decoder").run({"latents": np.ascontiguousarray(latents)})
        return [Image.fromarray(picture) for picture in pixels["pixels"]]

    def _parts(self, request: Request) -> list[Part]:
        """Name the engines that a request needs."""
        parts: list[Part] = [*self.model.text_encoders, "step", "vae_decoder"]
        if request.image is not None or self.model.is_inpainting:
            parts.append("vae_encoder")
        return parts

    def _masked(
        self, plan: Plan, noises: list[TorchNoise], shape: tuple[int, ...]
    ) -> dict[str, Array]:
        """Tell an inpainting model that everything is masked, and what is left is gray."""
        if not self.model.is_inpainting:
            return {}
        gray = np.full((plan.height, plan.width, 3), GRAY, np.uint8)
        latents = self._encode(gray, noises, shape)
        mask = np.ones_like(latents[:, :1])
        return {"image_conditioning": np.concatenate([mask, latents], axis=1)}

    def _encode(
        self, pixels: NDArray[np.uint8], noises: list[TorchNoise], shape: tuple[int, ...]
    ) -> Array:
        """Encode one picture for all, each drawing its own from the posterior."""
        inputs = {"pixels": _rows(pixels, len(noises)), "noise": _draw(noises, shape)}
        latents: Array = self.engine("vae_encoder").run(inputs)["latents"]
        return latents

    def _start(self, plan: Plan, noises: list[TorchNoise], shape: tuple[int, ...]) -> Array:
        """Return the latents that the first step sees; the draws' order is that of diffusers."""
        steps = plan.program
        signal: Array | np.float32 = np.float32(0)
        if plan.image is not None:
            size = (plan.width, plan.height)
            picture = as_rgb(plan.image).resize(size, Image.Resampling.LANCZOS)
            latents = self._encode(np.asarray(picture), noises, shape)
            signal = np.float32(steps.signal_scale) * latents
        started: Array = signal + np.float32(steps.noise_scale) * _draw(noises, shape)
        return started

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int]:
        vae = self.model.vae
        return vae.latent_channels, plan.height // vae.compression, plan.width // vae.compression


def _draw(noises: list[TorchNoise], shape: tuple[int, ...]) -> Array:
    """Draw from each picture's own generator, as diffusers does with a list of them."""
    return np.concatenate([noise.normal((1, *shape)) for noise in noises])


def _rows(value: Any, batch: int) -> NDArray[Any]:
    """Repeat one picture's value for the whole batch; float64 becomes float32."""
    value = np.asarray(value)
    dtype = np.float32 if value.dtype == np.float64 else value.dtype
    return np.repeat(value.astype(dtype)[None], batch, axis=0)
