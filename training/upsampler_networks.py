"""The networks that learn to enlarge: a UNet that denoises, and one that does so in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.upsampler import NORM_EPS, NORM_GROUPS, UpsamplerConfig
from engine.configs.upscalers import COLOURS, CompactConfig
from export.modules.embeddings import TimestepEmbedding, sinusoids
from export.modules.layers import Downsample, ResnetBlock, Upsample


class Level(nn.Module):
    """The residual blocks of one level, and what halves or doubles the sides behind them."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        time_channels: int,
        *,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                inputs, outputs, groups=NORM_GROUPS, eps=NORM_EPS, time_channels=time_channels
            )
            for inputs, outputs in channels
        )
        width = channels[-1][1]
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])


class UpsamplerUNet(nn.Module):
    """A diffusion upsampler's UNet, with the names of diffusers' UNet2DModel."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        widths, time = config.block_out_channels, config.time_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(2 * config.out_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        self.class_embedding = TimestepEmbedding(widths[0], time)
        self.down_blocks = nn.ModuleList(
            Level(blocks, time, down=i < last) for i, blocks in enumerate(config.down_channels())
        )
        self.mid_block = Level([(widths[-1], widths[-1])] * 2, time)
        self.up_blocks = nn.ModuleList(
            Level(blocks, time, up=i < last) for i, blocks in enumerate(config.up_channels())
        )
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)  # begins with Lanczos' picture

    def forward(self, sample: Tensor, timesteps: Tensor, noise_levels: Tensor) -> Tensor:
        """Return x0 (B, C, h, w) for sample (B, 2 C, h, w), timesteps and noise levels (B,)."""
        told = self._embed(self.time_embedding, timesteps, sample.dtype)
        told = told + self._embed(self.class_embedding, noise_levels, sample.dtype)
        x = self.conv_in(sample)
        skips = [x]
        for level in self.down_blocks:
            assert isinstance(level, Level)
            for resnet in level.resnets:
                x = resnet(x, told)
                skips.append(x)
            for downsampler in level.downsamplers:
                x = downsampler(x)
                skips.append(x)
        for resnet in self.mid_block.resnets:
            x = resnet(x, told)
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for resnet in level.resnets:
                x = resnet(torch.cat([x, skips.pop()], dim=1), told)
            for upsampler in level.upsamplers:
                x = upsampler(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out

    def _embed(self, embedding: nn.Module, values: Tensor, dtype: torch.dtype) -> Tensor:
        waves = sinusoids(values, self.config.block_out_channels[0], flip=True, shift=0)
        embedded: Tensor = embedding(waves.to(dtype))
        return embedded


class OnePass(nn.Module):
    """SRVGGNetCompact (Real-ESRGAN, Wang et al. 2021, arXiv:2107.10833), with its file's names."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_feat
        layers: list[nn.Module] = []
        for i in range(config.num_conv + 1):
            conv = nn.Conv2d(width if i else COLOURS, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, a=0.25)  # the PReLUs' slope: nothing vanishes
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.PReLU(width)]
        end = nn.Conv2d(width, COLOURS * config.upscale**2, 3, padding=1)
        nn.init.zeros_(end.weight)  # begins with the picture's pixels, repeated
        self.body = nn.Sequential(*layers, end)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pixels (B, 3, scale · h, scale · w) for (B, 3, h, w), both of 0 to 1."""
        scale = self.config.upscale
        larger = F.interpolate(pixels, scale_factor=scale, mode="nearest")
        return larger + F.pixel_shuffle(self.body(pixels), scale)


def one_pass_config(config: UpsamplerConfig, calls: int, num_feat: int = 64) -> CompactConfig:
    """Return the one-pass network that makes as many multiplications as so many calls of a UNet.

    Its depth is the nearest that there is; both work on the low picture's grid.
    """
    ends = 9 * num_feat * (COLOURS + COLOURS * config.upscale**2)
    num_conv = round((calls * config.products() - ends) / (9 * num_feat**2))
    return CompactConfig(num_feat=num_feat, num_conv=max(num_conv, 1), upscale=config.upscale)


def one_pass_products(config: CompactConfig) -> int:
    """Count the multiplications of a one-pass network, for each pixel of the low picture."""
    ends = 9 * config.num_feat * (COLOURS + COLOURS * config.upscale**2)
    return ends + 9 * config.num_conv * config.num_feat**2
