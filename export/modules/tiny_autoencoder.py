"""A tiny autoencoder: TAESD (Bohan, "Tiny AutoEncoder for Stable Diffusion").

Attribute names are those of diffusers' AutoencoderTiny; for previews it has no encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.diffusion import TinyAutoencoderConfig, TinyDecoderConfig

LIMIT = 3.0  # latents are bent smoothly into -3 to 3


class TinyBlock(nn.Module):
    """Three convolutions with ReLU around a residual connection, (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the block's output, (B, C, h, w), which is not negative."""
        return F.relu(self.conv(hidden_states) + hidden_states)


class TinyDecoder(nn.Module):
    """Latents (B, latent_channels, h, w), scaled as drawn, to pictures (B, 3, 8 h, 8 w)."""

    def __init__(self, config: TinyAutoencoderConfig | TinyDecoderConfig) -> None:
        super().__init__()
        width, levels = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            nn.ReLU(),
        ]
        for level, blocks in enumerate(levels, 1):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < len(levels):
                layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers.append(nn.Conv2d(width, 3, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [0, 1], not clamped, of latents (B, C, h, w)."""
        return self.layers(torch.tanh(latents / LIMIT) * LIMIT)


class TinyEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to latents (B, latent_channels, H / 8, W / 8), scaled."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            else:
                layers.append(nn.Conv2d(3, width, 3, padding=1))
            layers += [TinyBlock(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) of pixels (B, 3, H, W), as they are in the sampler."""
        return self.layers(pixels)


class TinyAutoencoder(nn.Module):
    """A tiny autoencoder, or the half of one that previews need."""

    def __init__(self, config: TinyAutoencoderConfig | TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        if isinstance(config, TinyAutoencoderConfig):
            self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)


class TinyEncode(nn.Module):
    """pixels (B, H, W, 3) uint8 -> latents (B, C, h, w) float32, scaled; noise is not used."""

    def __init__(self, autoencoder: TinyAutoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Encode (B, H, W, 3) uint8; there is no distribution to draw from with the noise."""
        dtype = next(self.model.parameters()).dtype
        scaled = pixels.float().permute(0, 3, 1, 2) / 255.0
        return self.model.encoder(scaled.to(dtype)).float()


class PreviewDecode(nn.Module):
    """latents (B, C, h, w) float32, scaled -> pixels (B, H, W, 3) uint8."""

    def __init__(self, autoencoder: TinyAutoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w), round to bytes: (B, H, W, 3) uint8."""
        dtype = next(self.model.parameters()).dtype
        pixels = self.model.decoder(latents.to(dtype)).float()
        pixels = (pixels * 255.0).clamp(0.0, 255.0).round()
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)
