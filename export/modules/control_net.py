"""ControlNet: a copy of a UNet's way down that sees a picture and steers the UNet with it.

(Zhang et al. 2023, arXiv:2302.05543, section 3.) Attribute names are those of diffusers'
ControlNetModel, so its state dict loads strictly.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.control_net import ControlNetConfig
from export.modules.layers import for_groups
from export.modules.unet import UNetEncoder


class HintEncoder(nn.Module):
    """Convolutions that bring a picture to the size and width of the UNet's first level."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, 8 h, 8 w) -> (B, C, h, w)."""
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """The way down of a UNet, with a convolution of one pixel behind everything it leaves."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(config)
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(width, width, 1) for width in self.widths
        )
        width = config.block_out_channels[-1]
        self.controlnet_mid_block = nn.Conv2d(width, width, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        hint: Tensor,
        *,
        groups: int | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        type_embedding: Tensor | None = None,
    ) -> list[Tensor]:
        """Return what is added to the UNet's skips, and last behind its middle: (B, C, h, w) each.

        hint: (B, block_out_channels[0], h, w), of the hint encoder; type_embedding: (B, 4 C) of a
        union, added to the time embedding; the other arguments and groups are those of
        `UNet.with_deep`, and what is returned is g · B.
        """
        time_embedding = self.embed_time(timestep, sample.dtype)
        if type_embedding is not None:
            time_embedding = time_embedding + type_embedding
        first = self.conv_in(sample) + hint
        begun = groups
        if not self.begins_alike:
            first, time_embedding = for_groups(first, groups), for_groups(time_embedding, groups)
            begun = None
        if self.config.addition_embed_type is not None:
            time_embedding = time_embedding + self.embed_text(context, text_embeds, time_ids)
        last, skips, _ = self.encode(first, time_embedding, context, begun)
        maps = [for_groups(first, begun), *skips]
        residuals = [
            conv(features) for conv, features in zip(self.controlnet_down_blocks, maps, strict=True)
        ]
        return [*residuals, self.controlnet_mid_block(last)]


def by_level(maps: Sequence[Tensor], widths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Lay maps (B, C, h, w) of one level behind each other; widths: of each level's, in order."""
    left = list(maps)
    return [torch.cat([left.pop(0) for _ in level], dim=1) for level in widths]
