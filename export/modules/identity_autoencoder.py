"""The autoencoder that a model in pixels lacks: pixels of -1 to 1 for latents, and back."""

import torch
from torch import Tensor, nn

from engine.configs.diffusion import IdentityAutoencoderConfig

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a gray (ITU-R BT.601)


class IdentityAutoencoder(nn.Module):
    """What has no weights; config: how many channels its pixels have."""

    def __init__(self, config: IdentityAutoencoderConfig) -> None:
        super().__init__()
        self.config = config


class IdentityEncode(nn.Module):
    """pixels (B, H, W, 3) uint8 -> latents (B, C, H, W) float32; noise is not used."""

    def __init__(self, autoencoder: IdentityAutoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Scale (B, H, W, 3) uint8 to -1 to 1, gray where there is one channel."""
        scaled = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1.0
        if self.model.config.latent_channels == 3:
            return scaled
        red, green, blue = (scaled[:, i : i + 1] * weight for i, weight in enumerate(LUMA))
        return red + green + blue


class IdentityDecode(nn.Module):
    """latents (B, C, h, w) float32 -> pixels (B, h, w, 3) uint8."""

    def __init__(self, autoencoder: IdentityAutoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Round latents (B, C, h, w) of -1 to 1 to bytes, (B, h, w, 3) uint8."""
        pixels = (latents * 127.5 + 127.5).clamp(0.0, 255.0).round()
        if self.model.config.latent_channels == 1:
            pixels = torch.cat([pixels, pixels, pixels], dim=1)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)
