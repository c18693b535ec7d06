"""From a prompt to pictures: tokenise, encode, draw noise, step, decode.

Image-to-image changes the starting registers and the first step, nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends import BackendSettings, Engine, open_engine
from engine.errors import ModelError
from engine.graphs import Precision, find_graph, graph_folders
from engine.model import Model
from engine.models import find_model
from engine.signature import SIGNATURES, Part, signature
from runtime.images import as_rgb
from runtime.noise import TorchNoise
from runtime.plan import Array, Plan, Progress, Result
from runtime.request import Request
from runtime.samplers import program
from runtime.schedule import NoiseSchedule
from runtime.tokenizer import Tokenizer

PARTS: tuple[Part, ...] = ("text_encoder", "step", "vae_decoder", "vae_encoder")


class Pipeline:
    """A model with its engines; `load` makes one, a call draws pictures.

    Engines are opened when they are first needed and kept. Calls from several threads are safe
    as far as the backend's engines are; ONNX Runtime's are.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, open_part: Callable[[Part], Engine]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.schedule = NoiseSchedule.from_config(model.scheduler)
        self._open_part = open_part
        self.engines: dict[Part, Engine] = {}

    @classmethod
    def load(
        cls,
        model: str | Path = "pictogram",
        *,
        graphs: Path | None = None,
        precision: Precision = "float32",
        settings: BackendSettings | None = None,
    ) -> Self:
        """Load the model that ships, by its name, or a folder in diffusers' layout.

        graphs: a folder that `python -m export` wrote; None looks in the cache and the package.
        Raises ModelError, GraphError or BackendError.
        """
        opened = Model.open(find_model(model))
        tokenizer = Tokenizer.load(opened.path / "tokenizer")
        _check_fit(opened, tokenizer)
        chosen = settings or BackendSettings()

        def open_part(part: Part) -> Engine:
            config, folders = opened.config(part), graph_folders(graphs)
            graph = find_graph(part, config, precision, folders, opened.path)
            return open_engine(graph, opened.weights(part), chosen)

        return cls(opened, tokenizer, open_part)

    @property
    def model_path(self) -> Path:
        """The folder that the model came from, in diffusers' layout."""
        return self.model.path

    def engine(self, part: Part) -> Engine:
        """Return a part's engine, opening it at the first call."""
        if part not in self.engines:
            self.engines[part] = self._open_part(part)
        return self.engines[part]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        sampler: str = "ddim",
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        eta: float = 0.0,
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
            height=height,
            width=width,
            seed=seed,
            image=image,
            strength=strength,
            eta=eta,
        )
        plan = self.plan(request)
        for progress in self.denoise(plan):
            latents = progress.latents
        return Result(images=self.decode(latents), seeds=plan.seeds, warnings=plan.warnings)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model, compute its sampler and encode its texts.

        Every engine that the request needs is open then: what is damaged is found before a step.
        """
        compression = self.model.vae.compression
        height, width = request.size(self.model.sample_size * compression, compression)
        strength = None if request.image is None else request.strength
        steps = program(
            request.sampler,
            self.schedule,
            int(request.num_inference_steps),
            strength=strength,
            eta=request.eta,
        )
        seeds = request.seeds()
        guided = request.guidance_scale > 1
        texts = [request.prompts()]
        weights = [1.0]
        if guided:
            texts = [request.negative_prompts(), *texts]
            weights = [1.0 - request.guidance_scale, request.guidance_scale]
        for part in PARTS if request.image is not None else PARTS[:-1]:
            self.engine(part)
        context, warnings = self._encode_texts(texts, request.num_images_per_prompt)
        return Plan(
            program=steps,
            context=context,
            guidance=np.repeat(np.array(weights, np.float32)[:, None], len(seeds), axis=1),
            seeds=seeds,
            height=height,
            width=width,
            image=request.image,
            warnings=warnings,
        )

    def denoise(self, plan: Plan) -> Iterator[Progress]:
        """Run the sampler; yields after every step. To cancel, stop iterating."""
        steps, batch = plan.program, len(plan.seeds)
        noises = [TorchNoise(seed) for seed in plan.seeds]
        shape = self._latent_shape(plan)
        engine = self.engine("step")
        registers = np.zeros((batch, steps.matrices.shape[1], *shape), np.float32)
        registers[:, 0] = self._start(plan, noises, shape)
        no_noise = np.zeros((batch, *shape), np.float32)
        total = len(steps.timesteps)
        for i in range(total):
            draws = steps.needs_noise[i]
            inputs: dict[str, NDArray[Any]] = {
                "registers": registers,
                "matrices": _rows(steps.matrices[i], batch),
                "timestep": _rows(steps.timesteps[i], batch),
                "input_scale": _rows(steps.input_scales[i], batch),
                "context": plan.context,
                "guidance": plan.guidance,
                "noise": _draw(noises, shape) if draws else no_noise,
            }
            registers = engine.run(inputs)["next_registers"]
            yield Progress(step=i + 1, total=total, latents=registers[:, 0])

    def decode(self, latents: Array) -> list[Image.Image]:
        """Decode latents (B, C, h, w) into pictures of 8 h by 8 w pixels."""
        pixels = self.engine("vae_decoder").run({"latents": np.ascontiguousarray(latents)})
        return [Image.fromarray(picture) for picture in pixels["pixels"]]

    def _encode_texts(self, groups: list[list[str]], repeats: int) -> tuple[Array, tuple[str, ...]]:
        """Encode each distinct text once; return the context (g, B, n, D) and what was cut."""
        distinct = list(dict.fromkeys(text for texts in groups for text in texts))
        tokens = self.tokenizer(distinct)
        encoded = self.engine("text_encoder").run({"input_ids": tokens.input_ids})
        rows = [
            [distinct.index(text) for text in texts for _ in range(repeats)] for texts in groups
        ]
        room = self.tokenizer.max_length - 2
        warnings = tuple(
            f"the prompt is longer than {room} tokens; it was cut before {_shorten(cut)!r}"
            for cut in tokens.cuts
            if cut is not None
        )
        return encoded["last_hidden_state"][np.array(rows)], warnings

    def _start(self, plan: Plan, noises: list[TorchNoise], shape: tuple[int, ...]) -> Array:
        """Return the latents that the first step sees; the draws' order is that of diffusers."""
        steps = plan.program
        signal: Array | np.float32 = np.float32(0)
        if plan.image is not None:
            size = (plan.width, plan.height)
            picture = as_rgb(plan.image).resize(size, Image.Resampling.LANCZOS)
            latents = self.engine("vae_encoder").run(
                {
                    "pixels": _rows(np.asarray(picture), len(noises)),
                    "noise": _draw(noises, shape),
                }
            )["latents"]
            signal = np.float32(steps.signal_scale) * latents
        started: Array = signal + np.float32(steps.noise_scale) * _draw(noises, shape)
        return started

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int]:
        vae = self.model.vae
        return vae.latent_channels, plan.height // vae.compression, plan.width // vae.compression


def _check_fit(model: Model, tokenizer: Tokenizer) -> None:
    """Raise ModelError unless the parts are of one model, and of a kind that is run here."""
    encoder = model.text_encoder
    if tokenizer.max_length > encoder.max_position_embeddings:
        raise ModelError(
            f"the tokenizer of {model.path} makes rows of {tokenizer.max_length} tokens and its "
            f"text encoder takes {encoder.max_position_embeddings}; use parts of one model"
        )
    if tokenizer.vocab_size > encoder.vocab_size:
        raise ModelError(
            f"the tokenizer of {model.path} knows {tokenizer.vocab_size} tokens and its text "
            f"encoder {encoder.vocab_size}; use parts of one model"
        )
    extra = signature("step", model.unet).inputs.keys() - SIGNATURES["step"].inputs.keys()
    if extra:
        raise ModelError(
            f"the UNet of {model.path} needs {', '.join(sorted(extra))} besides the text; "
            "use a Stable Diffusion 1.x or 2.x model"
        )


def _draw(noises: list[TorchNoise], shape: tuple[int, ...]) -> Array:
    """Draw from each picture's own generator, as diffusers does with a list of them."""
    return np.concatenate([noise.normal((1, *shape)) for noise in noises])


def _rows(value: Any, batch: int) -> NDArray[Any]:
    """Repeat one picture's value for the whole batch; float64 becomes float32."""
    value = np.asarray(value)
    dtype = np.float32 if value.dtype == np.float64 else value.dtype
    return np.repeat(value.astype(dtype)[None], batch, axis=0)


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
