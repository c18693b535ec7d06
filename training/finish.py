"""The decoder's finish: it learns to draw what a discriminator takes for a real picture.

As latent diffusion trains its autoencoder (Esser et al. 2021, arXiv:2012.09841, equations 5 to 7;
Rombach et al. 2022, arXiv:2112.10752): pixels, what a network sees in them, and from a step on a
discriminator of patches (Isola et al. 2017, arXiv:1611.07004) with the hinge loss, which weighs
half as much in the decoder's last layer as all else. The encoder stays, so latents stay true.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from export.modules.autoencoder import Autoencoder
from training.adversarial import fixed, hinge
from training.autoencoder import crops, picture_loss, psnr, reconstruct
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, autocast
from training.perceptual import Network, distance, mean_distance

WIDTHS = (32, 64, 128)
SLOPE = 0.2
PERCEPTUAL_WEIGHT = 0.2
ADVERSARIAL_WEIGHT = 0.5
MAX_WEIGHT = 1e4
ADVERSARIAL_START = 0.15  # of the training, in which the discriminator learns alone
WHOLE_PICTURES_FROM = 0.85
SHOWN = 12


class Discriminator(nn.Module):
    """Convolutions with spectral norms: images (B, 3, H, W) to logits of patches (B, 1, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [spectral_norm(nn.Conv2d(inner, outer, 4, 2, 1)), nn.LeakyReLU(SLOPE)]
        # The last is free to scale what the others may not, or all patches would look alike.
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return how real each patch of images (B, 3, H, W) of -1 to 1 looks, (B, 1, h, w)."""
        logits: Tensor = self.layers(images)
        return logits


class Opponents(nn.Module):
    """What is trained together: their losses share no parameter, so one optimiser serves both."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
        self.discriminator = Discriminator()

    def real_patches(self, images: Tensor) -> Tensor:
        """Return the discriminator's logits of images (B, 3, H, W), of which these alone learn."""
        return fixed(self.discriminator, images)


def train(
    autoencoder: Autoencoder,
    images: np.ndarray,
    network: Network,
    settings: LoopSettings,
    folder: Path,
    *,
    draws: np.ndarray | None = None,
) -> Autoencoder:
    """Train the decoder on images (n, H, W, 3) uint8; checkpoints and sample grids go to `folder`.

    network: whose features are compared; draws: as `training.autoencoder.train` has them
    """
    torch.manual_seed(settings.seed)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    module = Opponents(autoencoder)
    loop = Loop(module, settings, folder / "finish.pt")
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))
    pixels = torch.from_numpy(images).to(settings.device)
    weights = None if draws is None else torch.from_numpy(draws).to(settings.device)

    def form() -> tuple[bool, bool]:
        whole = settings.device != "cpu" or loop.fraction() > WHOLE_PICTURES_FROM
        return whole, loop.fraction() >= ADVERSARIAL_START

    def losses(step: int) -> Losses:
        whole, is_opposed = form()
        batch = crops(pixels, settings.batch_size, weights, whole=whole)
        with autocast(settings.device):
            with torch.no_grad():
                mean, std = autoencoder.encode(batch)
            output = autoencoder.decode(mean + std * torch.randn_like(mean)).float()
        seen = distance(network, output, batch)
        loss, mse = picture_loss(output, batch)
        shown = {"psnr": 10 * torch.log10(4.0 / mse.detach()), "seen": seen.detach()}
        loss = loss + PERCEPTUAL_WEIGHT * seen
        if is_opposed:
            adversarial = -module.real_patches(output).mean()
            weight = _weight(loss, adversarial, autoencoder.decoder.conv_out.weight)
            loss = loss + weight * adversarial
            shown["weight"] = weight
        told = hinge(module.discriminator(batch), module.discriminator(output.detach()))
        return {"loss": loss + told, **shown, "hinge": told.detach()}

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, Opponents)
        chosen = images[:: max(len(images) // SHOWN, 1)][:SHOWN]
        rows = [chosen, reconstruct(ema.autoencoder, chosen)]
        save_grid(rows, folder / f"finish-{step:06d}.png")

    ema = loop.run(losses, sample=sample, name="finish", form=form)
    assert isinstance(ema, Opponents)
    return ema.autoencoder


def _weight(loss: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Weigh the discriminator by the two losses' gradients in the decoder's last layer."""
    sizes = [
        torch.autograd.grad(value, last, retain_graph=True)[0].norm()
        for value in (loss, adversarial)
    ]
    return ADVERSARIAL_WEIGHT * (sizes[0] / (sizes[1] + 1e-4)).clamp(max=MAX_WEIGHT).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A decoder before and after: PSNR in dB, and the judge's distance to the originals."""

    psnr: tuple[float, float]
    distance: tuple[float, float]

    def asdict(self) -> dict[str, list[float]]:
        """Return the figures for JSON."""
        return {name: list(values) for name, values in asdict(self).items()}


def compare(
    before: Autoencoder, after: Autoencoder, images: np.ndarray, judge: Network
) -> Comparison:
    """Compare what two autoencoders make of images (n, H, W, 3) uint8, held out of training."""
    made = [reconstruct(module, images) for module in (before, after)]
    first, second = (psnr(images, drawn) for drawn in made)
    near, nearer = (mean_distance(judge, images, drawn) for drawn in made)
    return Comparison(psnr=(first, second), distance=(near, nearer))
