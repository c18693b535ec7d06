"""The loop over the steps, from a plan to latents, and the way between latents and pixels.

The draws of each picture's noise come in diffusers' order: the posterior of the image, the start,
the posterior of the masked image, then the calls that draw.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Engine
from engine.devices.device import DeviceEngine, Held, is_on_device, on_host
from engine.graphs.signature import Part
from engine.model import Model
from runtime.denoising.device_loop import DeviceLoop
from runtime.denoising.host_loop import Calls, run_calls
from runtime.denoising.inpainting import blend
from runtime.images import tiles
from runtime.images.canvas import GRAY, masked_pixels
from runtime.images.upscaling import PIXELS, upscale_latents, upscale_pixels
from runtime.noise import Noise, draw, make_noise
from runtime.plan import Array, Plan
from runtime.samplers import Program
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import predict


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """The state after a call of the UNet, for progress and previews.

    step: 1 to total
    """

    step: int
    total: int
    denoised: Callable[[], Array]
    """Computes (B, C, height // 8, width // 8): the x0 that the model believed in at this call."""
    registers: Held

    @property
    def latents(self) -> Array:
        """(B, C, height // 8, width // 8) float32, at the noise level of the next call.

        On a device, waits for them.
        """
        return on_host(self.registers)[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Denoiser:
    """A model's engines in a loop; engine: returns the engine of a part."""

    model: Model
    schedule: NoiseSchedule
    engine: Callable[[Part], Engine]
    device_loop: DeviceLoop = field(default_factory=DeviceLoop)

    def run(self, plan: Plan) -> Iterator[Progress]:
        """Run a plan and what follows it; yields after every call of the UNet."""
        done = 0
        progress: Progress | None = None
        for run in plan.runs():
            known = None if progress is None else progress.latents
            calls = self._calls(run, plan.upscaler, known)
            for step, (inputs, registers) in enumerate(self._steps(calls), start=1):
                progress = Progress(
                    step=done + step,
                    total=plan.calls,
                    denoised=partial(self._denoised, run.program, step - 1, inputs, registers),
                    registers=registers,
                )
                yield progress
            done += step

    def finish(self, plan: Plan) -> Held:
        """Run a plan and what follows it; returns the latents (B, C, h, w), where they are.

        On a device the processor waits for nothing of the last run.
        """
        latents: Held | None = None
        for run in plan.runs():
            known = None if latents is None else on_host(latents)
            calls = self._calls(run, plan.upscaler, known)
            if is_on_device(self.engine("step")):
                latents = self.device_loop.finish(calls, self._device_engine)
            else:
                *_, (_, registers) = run_calls(calls, self.engine)
                latents = registers[:, 0]
        assert latents is not None
        return latents

    def decode(self, latents: Held) -> NDArray[np.uint8]:
        """Decode latents (B, C, h, w) into pixels (B, 8 h, 8 w, 3); large ones in tiles."""
        engine = self.engine("vae_decoder")
        if not is_on_device(engine):
            latents = on_host(latents)
        return tiles.decode(engine.run, latents, self.model.vae.compression)

    def _steps(self, calls: Calls) -> Iterator[tuple[Mapping[str, Any], Held]]:
        if is_on_device(self.engine("step")):
            return self.device_loop.steps(calls, self._device_engine)
        return run_calls(calls, self.engine)

    def _device_engine(self, part: Part) -> DeviceEngine:
        engine = self.engine(part)
        assert is_on_device(engine)
        return engine

    def _calls(self, plan: Plan, upscaler: str, known: Array | None) -> Calls:
        """Collect what the calls are told; known: latents (B, C, h, w), smaller, to start from."""
        noises = [make_noise(plan.noise, seed) for seed in plan.seeds]
        if known is not None:
            known = self._enlarged(known, plan, noises, upscaler)
        program, batch, shape = plan.program, len(noises), self._latent_shape(plan)
        picture, start, constant = self._start(plan, noises, known)
        matrices, outside = program.matrices, np.zeros(program.matrices.shape[::2])
        registers = np.zeros((batch, matrices.shape[1], *shape), np.float32)
        if picture is not None:
            matrices, outside = blend(program)
            registers = np.concatenate([registers, picture], axis=1)
        registers[:, 0] = start
        tables = {
            "matrices": matrices,
            "outside": outside,
            "timestep": program.timesteps,
            "input_scale": program.input_scales,
        }
        return Calls(
            registers=registers,
            told=plan.conditioning,
            constant=constant,
            tables={name: _rows(table, batch) for name, table in tables.items()},
            noises=noises,
            needs_noise=program.needs_noise,
            whole=plan.whole,
        )

    def _denoised(
        self, program: Program, call: int, inputs: Mapping[str, Any], registers: Held
    ) -> Array:
        """Return the x0 that the model believed in at a call."""
        levels = program.signal_scales[call], program.noise_scales[call]
        x, out = np.eye(2)
        x0_row, _ = predict(self.schedule, levels[1], x, out, levels[0])
        known = {**inputs, "registers": on_host(inputs["registers"])}
        return denoised(known, on_host(registers)[:, 0], x0_row)

    def _start(
        self, plan: Plan, noises: Sequence[Noise], known: Array | None
    ) -> tuple[Array | None, Array, dict[str, Array]]:
        """Return what the first call starts from, and the inputs that stay.

        First what an ordinary model keeps outside the mask, (B, 2, C, h, w): the picture's latents
        and the starting noise; None where nothing is kept.
        """
        program, shape, batch = plan.program, self._latent_shape(plan), len(noises)
        keeps = plan.mask is not None and not self.model.is_inpainting
        if plan.image is not None and (keeps or not plan.from_noise):
            known = self._encode(np.asarray(plan.image), noises)
        noise = draw(noises, shape)
        if plan.from_noise:
            start = np.float32(program.initial_noise) * noise
        else:
            assert known is not None
            start = np.float32(program.signal_scales[0]) * known
            start += np.float32(program.noise_scales[0]) * noise
        mask = np.ones((batch, 1, *shape[1:]), np.float32)
        rescale = np.full(batch, plan.guidance_rescale, np.float32)
        constant = {"guidance_rescale": rescale, "mask": mask}
        if self.model.is_inpainting:
            constant["image_conditioning"] = self._shown(plan, noises)
        elif plan.cells is not None:
            constant["mask"] = np.repeat(plan.cells[None], batch, axis=0)
            draw(noises, shape)  # of the masked image, which diffusers encodes here for nothing
        if not keeps:
            return None, start, constant
        assert known is not None
        return np.stack([known, noise], axis=1), start, constant

    def _shown(self, plan: Plan, noises: Sequence[Noise]) -> Array:
        """Return what a nine-channel model sees beside the latent, (B, 1 + C, h, w).

        The mask, and the latents of the image without what it covers; without a mask that is all.
        """
        if plan.cells is None or plan.mask is None or plan.image is None:
            mask = np.ones((1, *self._latent_shape(plan)[1:]), np.float32)
            pixels = np.full((plan.height, plan.width, 3), GRAY, np.uint8)
        else:
            mask, pixels = plan.cells, masked_pixels(plan.image, plan.mask)
        masks = np.repeat(mask[None], len(noises), axis=0)
        return np.concatenate([masks, self._encode(pixels, noises)], axis=1)

    def _enlarged(
        self, latents: Array, plan: Plan, noises: Sequence[Noise], upscaler: str
    ) -> Array:
        """Enlarge finished latents to a plan's size, by way of the pixels or directly."""
        if upscaler != PIXELS:
            compression = self.model.vae.compression
            sides = plan.height // compression, plan.width // compression
            return upscale_latents(latents, *sides, upscaler)
        pictures = [Image.fromarray(pixels) for pixels in self.decode(latents)]
        size = {"height": plan.height, "width": plan.width}
        larger = [np.asarray(upscale_pixels(picture, **size)) for picture in pictures]
        return self._encode(np.stack(larger), noises)

    def _encode(self, pixels: NDArray[np.uint8], noises: Sequence[Noise]) -> Array:
        """Encode a picture for all, (H, W, 3), or one for each; each draws its own posterior."""
        compression = self.model.vae.compression
        height, width = (side // compression for side in pixels.shape[-3:-1])
        noise = draw(noises, (self.model.vae.latent_channels, height, width))
        pixels = np.broadcast_to(pixels, (len(noises), *pixels.shape[-3:]))
        run = self.engine("vae_encoder").run
        return tiles.encode(run, np.ascontiguousarray(pixels), noise, compression)

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int]:
        vae = self.model.vae
        return vae.latent_channels, plan.height // vae.compression, plan.width // vae.compression


def denoised(
    inputs: Mapping[str, NDArray[Any]], latents: Array, x0_row: NDArray[np.float64]
) -> Array:
    """Return the x0 that the model believed in at a call, (B, C, h, w).

    The call made the latents by row 0 of its matrix, which is solved for the model's output.
    Outside a mask it is the picture that is kept there.

    inputs: of the step; latents: (B, C, h, w) that it gave, by a row that is not 0 for the output
    x0_row: (2,), weights of x and of the output in x0
    """
    registers, weights = inputs["registers"], inputs["matrices"][0, 0]
    of_x, of_out = x0_row.astype(np.float32)
    known = np.einsum("r,brchw->bchw", weights[:-2], registers) + weights[-1] * inputs["noise"]
    x0: Array = of_x * registers[:, 0] + of_out / weights[-2] * (latents - known)
    if inputs["outside"].any():
        x0 = inputs["mask"] * x0 + (1 - inputs["mask"]) * registers[:, -2]
    return x0


def _rows(table: NDArray[Any], batch: int) -> Array:
    """Repeat one picture's numbers for the whole batch, call by call: (N, …) -> (N, B, …)."""
    return np.repeat(np.asarray(table, np.float32)[:, None], batch, axis=1)
