"""Where a run starts, and the way between latents and pixels.

The draws of each picture's noise come in diffusers' order: the posterior of the image, the start,
the posterior of the masked image, then the calls that draw.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import FindEngine
from engine.backends.settings import BackendSettings
from engine.devices.device import DeviceArray, HostOrDeviceArray, on_host
from engine.errors import RequestError
from engine.graphs.graph import Part
from engine.model import Model
from runtime.editing import edited_latents
from runtime.images import tiles
from runtime.images.canvas import GRAY, masked_pixels
from runtime.images.image_noise import noise_seed, noisy_pixels
from runtime.images.upscaling import PIXELS, is_trained, upscale_latents, upscale_pixels
from runtime.noise import Noise, draw, fresh_noise, make_noise, vary
from runtime.plan import Array, Plan, StepInputs
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import predict

if TYPE_CHECKING:
    from runtime.images.upscaler import Upscaler


@dataclass(slots=True, kw_only=True, eq=False)
class State:
    """A run between two calls of the UNet, of B pictures; a call makes another.

    registers: (B, r, C, h, w) float32, the latents and what the sampler remembers; an array of the
        device where the engines live on one
    constant: inputs of every call that stay the same, each (B, ...)
    noise: yields each call's fresh noise, (B, C, h, w)
    keeps_deep: whether a later call takes the deep features of a call before
    deep: those of the last call that ran the whole UNet, if they are kept
    residuals: what was added to that call's maps of the first level, if the run is controlled
    hints: what the run's nets made of their pictures, one array or several each, where the nets are
    given: all inputs of the call that made this state, None at the start
    """

    registers: HostOrDeviceArray
    constant: Mapping[str, Array]
    noise: Iterator[Array]
    keeps_deep: bool
    deep: HostOrDeviceArray | None = None
    residuals: HostOrDeviceArray | None = None
    hints: Sequence[Sequence[HostOrDeviceArray]] = ()
    given: Mapping[str, Any] | None = None

    def inputs(self, step: StepInputs) -> dict[str, Any]:
        """Return all inputs of a call; it draws the call's noise, so ask once for each."""
        given: dict[str, Any] = {
            **step.told(self.constant),
            **step.per_step,
            "registers": self.registers,
            "noise": next(self.noise),
        }
        if not step.is_full:
            given["deep"] = self.deep
            if step.is_controlled:
                given["residuals_0"] = self.residuals
        return given

    def after(self, outputs: Mapping[str, HostOrDeviceArray], given: Mapping[str, Any]) -> "State":
        """Return the state that a call makes; outputs: of the step's engine, given: its inputs."""
        return State(  # `replace` would take as long as all else between two calls
            registers=outputs["next_registers"],
            constant=self.constant,
            noise=self.noise,
            keeps_deep=self.keeps_deep,
            deep=outputs.get("deep", self.deep) if self.keeps_deep else None,
            residuals=given.get("residuals_0") if self.keeps_deep else None,
            hints=self.hints,
            given=given,
        )

    @property
    def latents(self) -> Array:
        """(B, C, h, w) float32, at the noise level of the next call; waits for a device's."""
        return _on_host(self.registers)[:, 0]

    def changed(self, told: Mapping[str, Any] | None) -> "State":
        """Return the state with other latents, as a step's callback returns them.

        Raises RequestError for what cannot be changed.
        """
        if not told:
            return self
        if set(told) != {"latents"}:
            raise RequestError(
                f"callback_on_step_end returned {', '.join(map(str, told))}; only the latents can "
                "be changed between steps"
            )
        registers = np.array(_on_host(self.registers))
        registers[:, 0] = told["latents"]
        return replace(self, registers=registers)


@dataclass(slots=True, kw_only=True, eq=False)  # as StepInputs
class Progress:
    """The state after a call of the UNet, for progress and previews.

    step: 1 to total
    denoised: computes the x0 that the model predicted at this call, (B, C, h, w) float32
    """

    step: int
    total: int
    denoised: Callable[[], Array]
    state: State

    @property
    def latents(self) -> Array:
        """(B, C, height // 8, width // 8) float32, at the noise level of the next call.

        On a device, waits for them.
        """
        return self.state.latents


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentSpace:
    """The latents of a model.

    engine: returns the engine of a part
    threads: of the trained upscalers that hires fix names; upscalers: those that are open, by path
    seamless: the axes along which the opposite edges of pictures join, as `Request` has them
    """

    model: Model
    engine: FindEngine
    threads: int | None = None
    upscalers: "dict[str, Upscaler]" = field(default_factory=dict)
    seamless: str | None = None

    def start(self, plan: Plan, latents: HostOrDeviceArray | None = None) -> State:
        """Return what a run's first call starts from.

        latents: (B, C, h, w) of the run before, which are enlarged to this one's size
        Raises BackendError when an engine fails.
        """
        if plan.seamless != self.seamless:
            return replace(self, seamless=plan.seamless).start(plan, latents)
        rngs = [make_noise(plan.noise, seed) for seed in plan.seeds]
        if latents is not None:
            latents = self._enlarged(_on_host(latents), plan, rngs)
        program, shape, batch = plan.program, self.shape(plan), len(rngs)
        if plan.image is not None and (plan.blends or not plan.from_noise):
            latents = self._encode(self._start_pixels(plan), rngs)
        noise = draw(rngs, shape) if plan.latents is None else plan.latents
        if plan.variation_seeds:
            others = [make_noise(plan.noise, seed) for seed in plan.variation_seeds]
            noise = vary(noise, draw(others, shape), plan.variation_strength)
        if plan.from_noise:
            x = np.float32(program.initial_noise) * noise
        else:
            assert latents is not None
            x = np.float32(program.signal_scales[0]) * latents
            x += np.float32(program.noise_scales[0]) * noise
        constant: dict[str, Array] = {"mask": np.ones((batch, 1, *shape[1:]), np.float32)}
        constant["guidance_rescale"] = np.full(batch, plan.guidance_rescale, np.float32)
        if self.model.is_editing:
            constant["image_latents"] = edited_latents(self.model, self.engine, plan.image, batch)
        if self.model.is_inpainting:
            constant["image_conditioning"] = self._image_conditioning(plan, rngs)
        elif plan.cells is not None:
            constant["mask"] = np.repeat(plan.cells[None], batch, axis=0)
            if self.model.vae.draws_posterior:
                draw(rngs, shape)  # of the masked image, which diffusers encodes here for nothing
        registers = np.zeros((batch, program.matrices.shape[1], *shape), np.float32)
        if plan.blends:
            assert latents is not None
            registers = np.concatenate([registers, np.stack([latents, noise], axis=1)], axis=1)
        registers[:, 0] = x
        return State(
            registers=registers,
            constant=constant,
            noise=fresh_noise(rngs, shape, program.needs_noise),
            keeps_deep=not all(plan.full_calls),
        )

    def open_upscalers(self, plan: Plan) -> None:
        """Open the trained upscaler that a plan names, unless it is open.

        Raises ModelError, BackendError, and RequestError where it would make too large a picture.
        """
        first, *others = plan.runs()
        for path in (run.upscaler for run in others if is_trained(run.upscaler)):
            factor = max(others[-1].width / first.width, 1)
            self._upscaler(path).check_size(first.width, first.height, factor)

    def _upscaler(self, path: str) -> "Upscaler":
        if path not in self.upscalers:
            from runtime.images.upscaler import Upscaler

            own = BackendSettings(threads=self.threads)
            self.upscalers[path] = Upscaler.load(path, settings=own)
        return self.upscalers[path]

    def decode(self, latents: HostOrDeviceArray) -> NDArray[np.uint8]:
        """Decode latents (B, C, h, w) into pixels (B, 8 h, 8 w, 3); large ones in tiles."""
        if self.seamless:
            compression = self.model.vae.compression
            return tiles.decode_seamless(self.engine, _on_host(latents), compression, self.seamless)
        engine = self.engine("vae_decoder")
        if not hasattr(engine, "device"):
            latents = _on_host(latents)
        if math.prod(latents.shape[2:]) <= tiles.WHOLE:
            if not isinstance(latents, DeviceArray):
                latents = np.ascontiguousarray(latents)
            whole: NDArray[np.uint8] = engine.run({"latents": latents})["pixels"]  # type: ignore[dict-item]
            return whole
        return tiles.decode(engine.run, latents, self.model.vae.compression)

    def _start_pixels(self, plan: Plan) -> NDArray[np.uint8]:
        """Return the image that a run starts from, (H, W, 3), or noisy ones, (B, H, W, 3)."""
        pixels = np.asarray(plan.image)
        if plan.image_noise is None:
            return pixels
        streams = [make_noise(plan.noise, noise_seed(seed)) for seed in plan.seeds]
        return noisy_pixels(pixels, plan.image_noise, streams, plan.mask)

    def _image_conditioning(self, plan: Plan, rngs: Sequence[Noise]) -> Array:
        """Return what a nine-channel model sees beside the latent, (B, 1 + C, h, w).

        The mask, and the latents of the image without what it covers; without a mask that is all.
        """
        if plan.cells is None or plan.mask is None or plan.image is None:
            mask = np.ones((1, *self.shape(plan)[1:]), np.float32)
            pixels = np.full((plan.height, plan.width, 3), GRAY, np.uint8)
        else:
            mask, pixels = plan.cells, masked_pixels(plan.image, plan.mask)
        masks = np.repeat(mask[None], len(rngs), axis=0)
        return np.concatenate([masks, self._encode(pixels, rngs)], axis=1)

    def _enlarged(self, latents: Array, plan: Plan, rngs: Sequence[Noise]) -> Array:
        """Enlarge finished latents to a plan's size, by way of the pixels or directly."""
        if plan.upscaler != PIXELS and not is_trained(plan.upscaler):
            compression = self.model.vae.compression
            sides = plan.height // compression, plan.width // compression
            return upscale_latents(latents, *sides, plan.upscaler)
        images = [Image.fromarray(pixels) for pixels in self.decode(latents)]
        if is_trained(plan.upscaler):
            upscaler, factor = self._upscaler(plan.upscaler), plan.width / images[0].width
            images = [upscaler(image, max(factor, 1)) for image in images]
        size = {"height": plan.height, "width": plan.width}
        larger = [np.asarray(upscale_pixels(image, **size)) for image in images]
        return self._encode(np.stack(larger), rngs)

    def _encode(self, pixels: NDArray[np.uint8], rngs: Sequence[Noise]) -> Array:
        """Encode one image for all, (H, W, 3), or one for each; each draws its own posterior."""
        vae, compression = self.model.vae, self.model.vae.compression
        height, width = (side // compression for side in pixels.shape[-3:-1])
        shape = vae.latent_channels, height, width
        noise = np.zeros((len(rngs), *shape), np.float32)
        if vae.draws_posterior:
            noise = draw(rngs, shape)
        pixels = np.broadcast_to(pixels, (len(rngs), *pixels.shape[-3:]))
        pixels = np.ascontiguousarray(pixels)
        if self.seamless:
            return tiles.encode_seamless(self.engine, pixels, noise, compression, self.seamless)
        return tiles.encode(self.engine("vae_encoder").run, pixels, noise, compression)

    def shape(self, plan: Plan) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture's latents."""
        vae = self.model.vae
        return vae.latent_channels, plan.height // vae.compression, plan.width // vae.compression


def predicted_x0(schedule: NoiseSchedule, inputs: StepInputs, state: State) -> Array:
    """Return the x0 that the model predicted at the call that made a state, (B, C, h, w).

    The call made the latents by row 0 of its matrix, which is solved for the model's output.
    Outside a mask it is the image that is kept there.
    """
    assert state.given is not None
    x, out = np.eye(2)
    x0_row, _ = predict(schedule, inputs.noise_scale, x, out, inputs.signal_scale)
    given = {**state.given, "registers": _on_host(state.given["registers"])}
    if "directions" in given and given["directions"][..., 0].any():
        return _kept_outside(_on_host(state.registers)[:, 1], given)  # where CFG++ leaves it
    return solved_x0(given, state.latents, x0_row)


def solved_x0(
    given: Mapping[str, NDArray[Any]], latents: Array, x0_row: NDArray[np.float64]
) -> Array:
    """Solve a call for its predicted x0, (B, C, h, w).

    given: the inputs of the step; latents: (B, C, h, w) that it gave, by a row that is not 0 for
    the output; x0_row: (2,), weights of x and of the output in x0
    """
    registers, weights = given["registers"], given["matrices"][0, 0]
    of_x, of_out = x0_row.astype(np.float32)
    known = np.einsum("r,brchw->bchw", weights[:-2], registers) + weights[-1] * given["noise"]
    x0: Array = of_x * registers[:, 0] + of_out / weights[-2] * (latents - known)
    return _kept_outside(x0, given)


def _kept_outside(x0: Array, given: Mapping[str, NDArray[Any]]) -> Array:
    """Put the image that is kept outside a mask there."""
    if given["outside"].any():
        x0 = given["mask"] * x0 + (1 - given["mask"]) * given["registers"][:, -2]
    return x0


def _on_host(array: HostOrDeviceArray) -> NDArray[Any]:
    return array if isinstance(array, np.ndarray) else on_host(array)


def parts_of(plan: Plan, model: Model) -> list[Part]:
    """Return the parts that a plan needs, its second run included."""
    runs = list(plan.runs())
    parts: list[Part] = list(dict.fromkeys(part for run in runs for part in run.step_parts))
    parts.append("vae_decoder")
    ways = [run.upscaler for run in runs if run.upscaler]
    enlarges = any(way == PIXELS or is_trained(way) for way in ways)
    if plan.image is not None or enlarges or model.is_inpainting:
        parts.append("vae_encoder")
    return parts


def sizes_of(plan: Plan) -> dict[str, int]:
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
