"""Training of a tiny decoder for previews: distilled from the decoder of a model's autoencoder.

What it must draw well is what the denoiser believes in on the way, and finished latents. So it
learns from the latents of pictures and from what the denoiser makes of these, noised at random.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.configs.diffusion import TinyDecoderConfig
from export.modules.autoencoder import Autoencoder
from export.modules.tiny_autoencoder import TinyAutoencoder
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers.noise_schedule import NoiseSchedule
from training.autoencoder import encode
from training.dataset import TrainingSet
from training.diffusers_folder import DIFFUSERS, WEIGHTS, write_json, write_weights
from training.diffusion import SCHEDULER, Denoiser
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, autocast

BATCH = 32
PICTURES = 1000  # to learn from
LAST = torch.channels_last
BEYOND = 0.1  # what a pixel outside 0 to 1 counts there, lest one on the wrong side learn nothing
CONFIG = TinyDecoderConfig(
    latent_channels=8, decoder_block_out_channels=(9,) * 4, num_decoder_blocks=(1, 1, 1, 1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """latents: (n, C, h, w) float32, scaled; images: (n, 3, H, W) uint8, what they decode to."""

    latents: Tensor
    images: Tensor


@torch.no_grad()
def examples(
    data: TrainingSet, denoiser: Denoiser, autoencoder: Autoencoder, tokenizer: Tokenizer, seed: int
) -> Decoded:
    """Take latents of pictures, and for every other one what the denoiser makes of them."""
    torch.manual_seed(seed)
    rng, latents, images = np.random.default_rng(seed), [], []
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor
    chosen = np.arange(0, len(data.images), max(len(data.images) // PICTURES, 1))
    for some in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        with autocast("cpu"):
            x0 = (encode(autoencoder, data.images[some]).float() - shift) * scale
            ids = torch.from_numpy(tokenizer([data.caption(i, rng) for i in some]).input_ids)
            x0[::2] = _predicted_x0(denoiser, x0[::2], ids[::2])
            pixels = autoencoder.decode((x0 / scale + shift).contiguous(memory_format=LAST))
        latents.append(x0)
        images.append(pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte())
    return Decoded(latents=torch.cat(latents), images=torch.cat(images))


def _predicted_x0(denoiser: Denoiser, x0: Tensor, input_ids: Tensor) -> Tensor:
    """Noise latents at random timesteps; return the x0 that the denoiser then believes in."""
    alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod).float()
    timesteps = torch.randint(len(alphas), (len(x0),))
    alpha = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    x = alpha * x0 + sigma * torch.randn_like(x0)
    return alpha * x - sigma * denoiser(x, timesteps, input_ids).float()


def train(
    decoded: Decoded, settings: LoopSettings, folder: Path, config: TinyDecoderConfig = CONFIG
) -> TinyAutoencoder:
    """Train on the examples; checkpoints and sample grids go to `folder`."""
    torch.manual_seed(settings.seed)
    module = TinyAutoencoder(config)
    module.to(memory_format=LAST)  # type: ignore[call-overload]  # stubs lack it
    loop = Loop(module, settings, folder / "preview.pt")
    generator = torch.Generator().manual_seed(settings.seed + loop.step)

    def losses(step: int) -> Losses:
        chosen = torch.randint(len(decoded.latents), (settings.batch_size,), generator=generator)
        latents = decoded.latents[chosen].to(settings.device, memory_format=LAST)
        wanted = decoded.images[chosen].to(settings.device).float() / 255
        return {"loss": difference(module.decoder(latents), wanted)}

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, TinyAutoencoder)
        some = slice(None, None, max(len(decoded.latents) // 24, 1))
        drawn = draw(ema, decoded.latents[some])
        rows = [images.permute(0, 2, 3, 1).numpy() for images in (decoded.images[some], drawn)]
        save_grid(rows, folder / f"preview-{step:06d}.png")

    ema = loop.run(losses, sample=sample, name="preview")
    assert isinstance(ema, TinyAutoencoder)
    return ema


def difference(pixels: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared difference of images (B, 3, H, W) of 0 to 1, the first clamped."""
    clamped = pixels.clamp(0, 1)
    return (clamped + BEYOND * (pixels - clamped) - wanted).square().mean()


@torch.no_grad()
def draw(autoencoder: TinyAutoencoder, latents: Tensor) -> Tensor:
    """Decode latents (n, C, h, w) into bytes (n, 3, H, W)."""
    device = next(autoencoder.parameters()).device
    batches = [autoencoder.decoder(batch.to(device)).cpu() for batch in latents.split(BATCH)]
    return torch.cat([batch.clamp(0, 1).mul(255).round().byte() for batch in batches])


def write(autoencoder: TinyAutoencoder, folder: Path) -> Path:
    """Write `preview_decoder/` into a model's folder, as diffusers' AutoencoderTiny; return it.

    The encoder that its configuration names beside the decoder is small and has no weights.
    """
    out, config = folder / "preview_decoder", autoencoder.config
    small = {
        name: list(value)[::-1]
        for name, value in (
            ("encoder_block_out_channels", config.decoder_block_out_channels),
            ("num_encoder_blocks", config.num_decoder_blocks),
        )
    }
    stated = {"_class_name": "AutoencoderTiny", "_diffusers_version": DIFFUSERS}
    write_json(out / "config.json", {**stated, **asdict(config), **small})
    write_weights(autoencoder, out / WEIGHTS["vae"])
    return out
