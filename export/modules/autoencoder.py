"""The autoencoder: pictures to latents and back (Rombach et al. 2022, arXiv:2112.10752).

Attribute names are those of diffusers' AutoencoderKL, so its state dict loads strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.diffusion import AutoencoderConfig
from export.modules.layers import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # the group norms of the original autoencoder


class SpatialAttention(Attention):
    """One head of self-attention over all positions of a feature map, (B, C, h, w)."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(  # type: ignore[override]  # a feature map attends to itself alone
        self, hidden_states: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Return the feature map (B, C, h, w) plus its attention."""
        height, width = hidden_states.shape[2:]
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2)
        out = super().forward(tokens, context)
        return hidden_states + out.transpose(1, 2).unflatten(2, (height, width))


class MidBlock(nn.Module):
    """Two residual blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)]
        )
        if attention:
            self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups)])
        self.has_attention = attention

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        hidden_states = self.resnets[0](hidden_states)
        if self.has_attention:
            hidden_states = self.attentions[0](hidden_states)
        return self.resnets[1](hidden_states)


class DownEncoderBlock(nn.Module):
    """Residual blocks, then half the resolution unless it is the last block."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=EPS
            )
            for i in range(layers)
        )
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        self.last = last

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h // 2, w // 2)."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        return hidden_states if self.last else self.downsamplers[0](hidden_states)


class UpDecoderBlock(nn.Module):
    """Residual blocks, then twice the resolution unless it is the last block."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=EPS
            )
            for i in range(layers)
        )
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.last = last

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, 2 h, 2 w)."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        return hidden_states if self.last else self.upsamplers[0](hidden_states)


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to moments (B, 2·latent_channels, H / 8, W / 8)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block,
                groups=groups,
                last=i == len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(
            widths[-1], groups=groups, attention=config.mid_block_add_attention
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the moments before `quant_conv`, (B, 2 C, h, w), of pixels (B, 3, H, W)."""
        hidden_states = self.conv_in(pixels)
        for block in self.down_blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w), unscaled, to pictures (B, 3, 8 h, 8 w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(
            widths[0], groups=groups, attention=config.mid_block_add_attention
        )
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block + 1,
                groups=groups,
                last=i == len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1], not clamped, of latents (B, C, h, w)."""
        hidden_states = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class Autoencoder(nn.Module):
    """The variational autoencoder with its encoder and decoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, unscaled.

        pixels: (B, 3, H, W) in [-1, 1] -> two tensors (B, latent_channels, H / 8, W / 8).
        """
        moments = self.encoder(pixels)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        channels = self.config.latent_channels
        # Not `chunk`, whose ONNX has sequences, which TensorRT does not take.
        mean, log_variance = moments[:, :channels], moments[:, channels:]
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, 8 h, 8 w) of unscaled latents (B, latent_channels, h, w)."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
