"""Training of the autoencoder on random crops, then on whole pictures."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.diffusion import AutoencoderConfig
from export.modules.autoencoder import Autoencoder
from training import devices
from training.devices import share
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, autocast, draw
from training.store import ArrayWriter, mapped

CONFIG = AutoencoderConfig(
    block_out_channels=(32, 48, 96, 128),
    latent_channels=8,
    layers_per_block=1,
    norm_num_groups=8,
    mid_block_add_attention=False,
    scaling_factor=1.0,  # `normalise` puts the scale into the weights
)
CROP = 64  # pixels; whole pictures are used in the last part of the training, on a GPU always
WHOLE_PICTURES_FROM = 0.85
MOVE = 8  # pixels at most that a whole picture is moved by, its edge repeated
KL_WEIGHT = 1e-4  # keeps the latents near unit scale; far too weak to blur
GRADIENT_WEIGHT = 1.0
NORMALISED_BY = 8192  # pictures at least, of a set that has more


def train(
    images: np.ndarray,
    settings: LoopSettings,
    folder: Path,
    *,
    config: AutoencoderConfig = CONFIG,
    draws: np.ndarray | None = None,
) -> Autoencoder:
    """Train on images (n, H, W, 3) uint8; checkpoints and sample grids go to `folder`.

    draws: (n,), how often each is drawn beside the others; None draws all alike
    """
    torch.manual_seed(settings.seed)
    pixels = torch.from_numpy(images).to(settings.device)
    module = Autoencoder(config)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    loop = Loop(module, settings, folder / "autoencoder.pt")
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no crop twice
    weights = None if draws is None else torch.from_numpy(draws).to(settings.device)

    def whole() -> bool:
        return settings.device != "cpu" or loop.fraction() > WHOLE_PICTURES_FROM

    def losses(step: int) -> Losses:
        batch = crops(pixels, settings.batch_size, weights, whole=whole())
        with autocast(settings.device):
            mean, std = module.encode(batch)
            noise = torch.randn(devices.count() * len(mean), *mean.shape[1:], device=mean.device)
            latents = mean + std * share(noise).to(mean)
            output = module.decode(latents).float()
        return _losses(output, batch, mean.float(), std.float())

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, Autoencoder)
        chosen = images[:: max(len(images) // 24, 1)][:24]
        save_grid([chosen, reconstruct(ema, chosen)], folder / f"autoencoder-{step:06d}.png")

    ema = loop.run(losses, sample=sample, name="autoencoder", form=whole)
    assert isinstance(ema, Autoencoder)
    return ema


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Encode and decode images (n, H, W, 3) uint8 in float32; return the same shape and dtype."""
    device = next(autoencoder.parameters()).device
    rows = []
    for batch in torch.from_numpy(images).split(16):
        mean, _ = autoencoder.encode(_to_pixels(batch).to(device))
        output = autoencoder.decode(mean).clamp(-1, 1).add(1).mul(127.5).round()
        rows.append(output.byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(rows).numpy()


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move each picture by up to two pixels each way, its edge repeated: (n, H, W, 3) uint8."""
    height, width = images.shape[1:3]
    result = np.empty_like(images)
    for index, (y, x) in enumerate(rng.integers(-2, 3, (len(images), 2))):
        rows, columns = (np.arange(height) + y), (np.arange(width) + x)
        kept = np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))
        result[index] = images[index][kept]
    return result


def encode(autoencoder: Autoencoder, images: np.ndarray) -> Tensor:
    """Return the means of the latents of images (n, H, W, 3) uint8, unscaled, float32."""
    return torch.cat(list(_encoded(autoencoder, images)))


def encode_into(autoencoder: Autoencoder, images: np.ndarray, path: Path) -> Tensor:
    """Write the latents of images (n, H, W, 3) uint8 into a file and map it: (n, C, h, w) float16.

    What an earlier run wrote of as many images is taken as it is.
    """
    if not path.exists() or len(mapped(path)) != len(images):
        partial, batches = path.with_suffix(".partial"), _encoded(autoencoder, images)
        first = next(batches)
        with ArrayWriter(partial, tuple(first.shape[1:]), np.float16) as writer:
            for latents in itertools.chain([first], batches):
                writer.append(latents.numpy())
        partial.replace(path)
    return torch.from_numpy(mapped(path))


@torch.no_grad()
def _encoded(autoencoder: Autoencoder, images: np.ndarray) -> Iterator[Tensor]:
    device = next(autoencoder.parameters()).device
    for batch in torch.from_numpy(images).split(32):
        yield autoencoder.encode(_to_pixels(batch).to(device))[0].cpu()


@torch.no_grad()
def normalise(autoencoder: Autoencoder, images: np.ndarray) -> None:
    """Give these images' latents mean 0 and standard deviation 1 in every channel.

    images: (n, H, W, 3) uint8

    The shift and the scale go into the 1x1 convolutions on both sides of the latents, so the
    autoencoder draws what it drew before, and diffusion starts from what it expects.
    """
    latents = encode(autoencoder, images[:: max(len(images) // NORMALISED_BY, 1)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inner, outer = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    mean, std = mean.to(inner.weight.device), std.to(inner.weight.device)
    assert inner.bias is not None
    assert outer.bias is not None
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.bias[channels:] -= 2 * std.log()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of uint8 pictures in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


def _to_pixels(images: Tensor) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def crops(images: Tensor, count: int, weights: Tensor | None, *, whole: bool) -> Tensor:
    """Draw crops of images (n, H, W, 3) uint8, mirrored half of the time: (B, 3, h, w) of -1 to 1.

    weights: (n,), how often each is drawn; a quarter as many whole pictures cost the same
    """
    device, size = images.device, images.shape[1]
    crop = size if whole else min(CROP, size)
    if whole:
        together = devices.count()
        count = max(count * CROP**2 // size**2 // together, 1) * together
    chosen = share(draw(len(images), count, weights, device))
    first, last = (-MOVE, MOVE) if whole else (0, size - crop)
    corners = share(torch.randint(first, last + 1, (count, 2, 1), device=device)).swapaxes(0, 1)
    rows, columns = (corners + torch.arange(crop, device=device)).clamp(0, size - 1)
    mirrored = share(torch.rand(count, 1, device=device) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return _to_pixels(images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]])


def picture_loss(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compare images (B, 3, H, W) of -1 to 1; returns the loss and their mean squared error."""
    error = output - target
    mse = error.square().mean()
    return error.abs().mean() + mse + GRADIENT_WEIGHT * _gradients(output, target), mse


def _losses(output: Tensor, target: Tensor, mean: Tensor, std: Tensor) -> Losses:
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()  # Kingma & Welling 2013, appendix B
    loss, mse = picture_loss(output, target)
    psnr_db = 10 * torch.log10(4.0 / mse.detach())
    return {"loss": loss + KL_WEIGHT * kl, "psnr": psnr_db, "kl": kl.detach()}


def _gradients(output: Tensor, target: Tensor) -> Tensor:
    """Compare differences of neighbours, which keeps outlines sharp."""
    total = output.new_zeros(())
    for axis in (2, 3):
        total = total + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return total
