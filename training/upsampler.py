"""The second stage: pictograms that learn to become larger, by diffusion and in one pass.

The pictures are the data set's pictograms, drawn at 256 pixels, and the low ones their means over
squares of as many pixels as the scale says. A subject of which one style is held out is held out
in every style, so nothing that is measured was seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from engine.configs.upsampler import (
    LOW_RES_SCHEDULER,
    MAX_NOISE_LEVEL,
    RESIDUAL_SCALE,
    SCHEDULER,
    STEPS,
    UpsamplerConfig,
)
from engine.configs.upscalers import CompactConfig
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from training.autoencoder import psnr
from training.loop import Loop, LoopSettings, Losses, autocast
from training.pictograms import Pictograms
from training.upsampler_networks import OnePass, UpsamplerUNet

SIZE = 256  # of the pictures that are learnt, in pixels
CROP = 128  # of which so many are seen at once
WIDTHS = {2: (24, 48, 96), 4: (48, 96, 144)}  # of the UNet's levels, by the scale
WITHOUT_NOISE = 0.5  # share of the low pictures whose noise is of level 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pictures and their low ones, as a batch of crops.

    high, enlarged: (B, 3, crop, crop) float32 of -1 to 1; enlarged: of low, by Lanczos' kernel
    low: (B, 3, crop / scale, crop / scale) float32 of -1 to 1
    """

    high: Tensor
    enlarged: Tensor
    low: Tensor

    def to(self, device: str) -> "Pairs":
        """Return the same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("high", "enlarged", "low")}
        return Pairs(**moved)


def split(pictograms: Pictograms) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures to train on, and those of the subjects that are held out in all styles.

    Both are (n, 256, 256, 3) uint8.
    """
    unseen = pictograms.held_out.any(axis=1)
    shape = (-1, *pictograms.images.shape[2:])
    return (pictograms.images[~unseen].reshape(shape), pictograms.images[unseen].reshape(shape))


def made_low(picture: np.ndarray, scale: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 whose pixels are the means of squares, `scale` wide."""
    return np.asarray(Image.fromarray(picture).reduce(scale))


def enlarge(low: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge a picture (h, w, 3) uint8 by Lanczos' kernel."""
    size = (scale * low.shape[1], scale * low.shape[0])
    return np.asarray(Image.fromarray(low).resize(size, Image.Resampling.LANCZOS))


def pairs(images: np.ndarray, scale: int, count: int, rng: np.random.Generator) -> Pairs:
    """Draw crops of pictures (n, H, W, 3) uint8, mirrored half of the time.

    The low ones are cut out of whole pictures that were made low, and so are the enlarged.
    """
    side = images.shape[1]
    crop = min(CROP, side)
    drawn = []
    for index in rng.integers(len(images), size=count):
        high = images[index]
        low = made_low(high, scale)
        top, left = (int(n) for n in rng.integers((side - crop) // scale + 1, size=2))
        mirrored = rng.random() < 0.5
        drawn.append(
            [
                _cut(high, scale * top, scale * left, crop, mirrored),
                _cut(enlarge(low, scale), scale * top, scale * left, crop, mirrored),
                _cut(low, top, left, crop // scale, mirrored),
            ]
        )
    stacked = (_as_tensor(np.stack(each)) for each in zip(*drawn, strict=True))
    return Pairs(**dict(zip(("high", "enlarged", "low"), stacked, strict=True)))


def _cut(picture: np.ndarray, top: int, left: int, side: int, mirrored: bool) -> np.ndarray:
    square = picture[top : top + side, left : left + side]
    return square[:, ::-1] if mirrored else square


def train_diffusion(
    images: np.ndarray,
    watched: np.ndarray,
    config: UpsamplerConfig,
    settings: LoopSettings,
    folder: Path,
) -> UpsamplerUNet:
    """Train the UNet on pictures (n, H, W, 3) uint8; its checkpoint goes to `folder`.

    watched: pictures whose PSNR is printed on the way
    """
    torch.manual_seed(settings.seed)
    unet, device = UpsamplerUNet(config), settings.device
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    loop = Loop(unet, replace(settings, records=False), folder / f"upsampler-{config.scale}x.pt")
    torch.manual_seed(settings.seed + 1 + loop.step)  # a resumed training draws no noise twice
    alphas, low_alphas = (
        torch.tensor(NoiseSchedule.from_config(each).alphas_cumprod).float().to(device)
        for each in (SCHEDULER, LOW_RES_SCHEDULER)
    )

    def losses(step: int) -> Losses:
        batch = _drawn(images, config.scale, settings, step)
        count = len(batch.high)
        timesteps = torch.randint(len(alphas), (count,), device=device)
        levels = torch.randint(MAX_NOISE_LEVEL + 1, (count,), device=device)
        levels = levels * (torch.rand(count, device=device) >= WITHOUT_NOISE)
        low = _noised(_cells(batch.enlarged, config), low_alphas, levels)
        x0 = (_cells(batch.high, config) - low) * RESIDUAL_SCALE
        alpha = alphas[timesteps].sqrt()[:, None, None, None]
        noised = alpha * x0 + (1 - alpha**2).sqrt() * torch.randn_like(x0)
        sample = torch.cat([noised, low], dim=1)
        with autocast(device):
            found = unet(sample, timesteps, levels)
        return {"loss": F.mse_loss(found.float(), x0)}

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, UpsamplerUNet)
        _show(step, watched, config.scale, lambda low: upsampled(ema, low, device))

    ema = loop.run(losses, sample=sample, name=f"diffusion {config.scale}x")
    assert isinstance(ema, UpsamplerUNet)
    return ema.cpu()


def train_one_pass(
    images: np.ndarray,
    watched: np.ndarray,
    config: CompactConfig,
    settings: LoopSettings,
    folder: Path,
) -> OnePass:
    """Train the network that enlarges in one pass, as `train_diffusion` trains the UNet.

    images, watched: pictures (n, H, W, 3) uint8
    """
    torch.manual_seed(settings.seed)
    network, device = OnePass(config), settings.device
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    loop = Loop(network, replace(settings, records=False), folder / f"one-pass-{config.scale}x.pt")

    def losses(step: int) -> Losses:
        batch = _drawn(images, config.scale, settings, step)
        with autocast(device):
            found = network(batch.low / 2 + 0.5)
        # Squared: an absolute error is least where flat colours are repeated and edges are left.
        return {"loss": F.mse_loss(found.float(), batch.high / 2 + 0.5)}

    def sample(ema: nn.Module, step: int) -> None:
        _show(step, watched, config.scale, lambda low: enlarged(ema, low, device))

    ema = loop.run(losses, sample=sample, name=f"one pass {config.scale}x")
    assert isinstance(ema, OnePass)
    return ema.cpu()


@torch.no_grad()
def upsampled(unet: UpsamplerUNet, low: np.ndarray, device: str, steps: int = STEPS) -> np.ndarray:
    """Enlarge pictures (n, h, w, 3) uint8 as the runtime does, with torch's noise of seed 0."""
    scale = unet.config.scale
    larger = _as_tensor(np.stack([enlarge(each, scale) for each in low])).to(device)
    generator = torch.Generator().manual_seed(0)
    cells = _cells(larger, unet.config)
    signal = float(NoiseSchedule.from_config(LOW_RES_SCHEDULER).alphas_cumprod[0])
    noise = [torch.randn(cells.shape, generator=generator).to(device) for _ in range(2)]
    cells, x = signal**0.5 * cells + (1 - signal) ** 0.5 * noise[0], noise[1]
    ddim = program("ddim", NoiseSchedule.from_config(SCHEDULER), steps)
    level = torch.zeros(len(low), device=device)
    for timestep, matrix in zip(ddim.timesteps, ddim.matrices, strict=True):
        told = torch.full((len(low),), float(timestep), device=device)
        with autocast(device):
            out = unet(torch.cat([x, cells], dim=1), told, level).float()
        x = float(matrix[0, 0]) * x + float(matrix[0, 1]) * out
    picture = F.pixel_shuffle(cells + x / RESIDUAL_SCALE, scale)
    return _as_pictures(picture)


@torch.no_grad()
def enlarged(network: nn.Module, low: np.ndarray, device: str) -> np.ndarray:
    """Enlarge pictures (n, h, w, 3) uint8 in one pass."""
    with autocast(device):
        found = network(_as_tensor(low).to(device) / 2 + 0.5)
    return _as_pictures(found.float() * 2 - 1)


def _show(
    step: int, watched: np.ndarray, scale: int, how: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Print the PSNR of what a network makes of held-out pictures, beside Lanczos'."""
    from tqdm import tqdm

    low = np.stack([made_low(each, scale) for each in watched])
    plain = np.stack([enlarge(each, scale) for each in low])
    ours = how(low)
    tqdm.write(
        f"step {step}: PSNR {psnr(watched, ours):.2f} dB of {len(low)} held-out pictures, "
        f"Lanczos {psnr(watched, plain):.2f} dB"
    )


def _drawn(images: np.ndarray, scale: int, settings: LoopSettings, step: int) -> Pairs:
    """Draw the batch of a step, which is the same for every network and after a resumption."""
    rng = np.random.default_rng([settings.seed, step])
    return pairs(images, scale, settings.batch_size, rng).to(settings.device)


def _cells(pictures: Tensor, config: UpsamplerConfig) -> Tensor:
    return F.pixel_unshuffle(pictures, config.scale)


def _noised(cells: Tensor, alphas_cumprod: Tensor, levels: Tensor) -> Tensor:
    signal = alphas_cumprod[levels][:, None, None, None]
    return signal.sqrt() * cells + (1 - signal).sqrt() * torch.randn_like(cells)


def _as_tensor(pictures: np.ndarray) -> Tensor:
    """Return pictures (n, H, W, 3) uint8 as (n, 3, H, W) float32 of -1 to 1, channels last."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _as_pictures(pixels: Tensor) -> np.ndarray:
    bytes_ = (pixels * 127.5 + 127.5).round().clamp(0, 255).byte()
    found: np.ndarray = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    return found
