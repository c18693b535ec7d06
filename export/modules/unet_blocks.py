"""The blocks of a UNet with cross-attention (Rombach et al. 2022, arXiv:2112.10752).

Attribute names are those of diffusers' UNet2DConditionModel, so its state dict loads strictly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.configs.diffusion import UNetConfig
from export.modules.layers import (
    GEGLU,
    Attention,
    Context,
    Downsample,
    ResnetBlock,
    TextAndImages,
    Upsample,
    for_groups,
    resized,
)

TRANSFORMER_EPS = 1e-6  # the group norm before a transformer; the residual blocks' is configured


class FeedForward(nn.Module):
    """GEGLU and a linear layer; `net.1` is the dropout of training, here nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, channels) -> (B, n, channels)."""
        return self.net(hidden_states)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a norm before it.

    text_alone: the first attends to the text too
    place: the level, the first of its columns in the keys of pictures, and their number
    """

    def __init__(self, channels: int, heads: int, context: int, *, text_alone: bool) -> None:
        super().__init__()
        self.text_alone = text_alone
        self.place = (0, 0, channels)
        self.norm1 = nn.LayerNorm(channels)
        first = context if text_alone else None
        self.attn1 = Attention(channels, heads, context_channels=first)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, hidden_states: Tensor, context: Context, groups: int | None = None) -> Tensor:
        """(B, n, channels), context (B, m, context_channels) -> (B, n, channels).

        With `groups`, what comes is the same for all g groups of the context, (g · B, m, …), and
        becomes theirs where it first meets them: -> (g · B, n, channels).
        """
        text, images = context, None
        if isinstance(context, TextAndImages):
            text, images = context.text, context.layer(*self.place)
        if self.text_alone:
            hidden_states = for_groups(hidden_states, groups)
            hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), text)
        else:
            hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
            hidden_states = for_groups(hidden_states, groups)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), text, images)
        return hidden_states + self.ff(self.norm3(hidden_states))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual around them.

    The projections in and out are 1x1 convolutions, or linear layers (Stable Diffusion 2 and XL).
    """

    def __init__(
        self, channels: int, heads: int, layers: int, config: UNetConfig, *, text_alone: bool
    ) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=TRANSFORMER_EPS)
        self.proj_in: nn.Module
        self.proj_out: nn.Module
        if self.linear:
            self.proj_in, self.proj_out = (nn.Linear(channels, channels) for _ in range(2))
        else:
            self.proj_in, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.cross_attention_dim, text_alone=text_alone)
            for _ in range(layers)
        )

    def forward(self, hidden_states: Tensor, context: Context, groups: int | None = None) -> Tensor:
        """(B, C, h, w), context (B, m, D) -> (B, C, h, w); for groups see TransformerBlock."""
        size = hidden_states.shape[2:]
        x = self.norm(hidden_states)
        x = x if self.linear else self.proj_in(x)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = self.proj_in(x) if self.linear else x
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, context, groups if i == 0 else None)
        x = self.proj_out(x) if self.linear else x
        x = x.unflatten(1, size).permute(0, 3, 1, 2)
        x = x if self.linear else self.proj_out(x)
        return for_groups(hidden_states, groups) + x


class Block(nn.Module):
    """One level of the UNet, or the middle (None); depths: of the transformers, 0 for none."""

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        config: UNetConfig,
        *,
        level: int | None,
        depths: Sequence[int],
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        width = channels[-1][1]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                inputs,
                outputs,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_channels=4 * config.block_out_channels[0],
            )
            for inputs, outputs in channels
        )
        attention = any(depths)
        if attention:
            heads = config.heads()[-1 if level is None else level]
            alone = config.attends_to_text_alone(level)
            self.attentions = nn.ModuleList(
                SpatialTransformer(width, heads, depth, config, text_alone=alone)
                for depth in depths
            )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(width)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(width)])
        self.has_attention = attention


class DownBlock(Block):
    """A level on the way down; also returns what the way up will want."""

    def forward(
        self,
        hidden_states: Tensor,
        time_embedding: Tensor,
        context: Context,
        groups: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (B, C, h // 2, w // 2), or (B, C, h, w) at the lowest level, and the skips.

        With `groups`, which needs attention, all that comes but the context is theirs in common.
        """
        skips = []
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, time_embedding)
            if self.has_attention:
                hidden_states = self.attentions[i](hidden_states, context, groups)
                time_embedding, groups = for_groups(time_embedding, groups), None
            skips.append(hidden_states)
        if hasattr(self, "downsamplers"):
            hidden_states = self.downsamplers[0](hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class MidBlock(Block):
    """The lowest level: residual block, transformer, residual block, or one residual block."""

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, context: Context) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        hidden_states = self.resnets[0](hidden_states, time_embedding)
        if self.has_attention:
            hidden_states = self.attentions[0](hidden_states, context)
            hidden_states = self.resnets[1](hidden_states, time_embedding)
        return hidden_states


class UpBlock(Block):
    """A level on the way up; every residual block also sees one skip."""

    def forward(
        self,
        hidden_states: Tensor,
        skips: list[Tensor],
        time_embedding: Tensor,
        context: Context,
        whole: int | None = None,
    ) -> Tensor:
        """Consume the last skips; return (B, C, h, w) at the size of the next level.

        Runs no more residual blocks than there are skips. whole: how many of the first skips are
        of the whole size, where the others are shrunk; what meets the last of them is enlarged.
        """
        for i in range(min(len(self.resnets), len(skips))):
            if len(skips) == whole:
                hidden_states = resized(hidden_states, tuple(skips[-1].shape[2:]))
            hidden_states = self.layer(i, hidden_states, skips.pop(), time_embedding, context)
        if hasattr(self, "upsamplers"):
            hidden_states = self.upsamplers[0](hidden_states, tuple(skips[-1].shape[2:]))
        return hidden_states

    def layer(
        self,
        i: int,
        hidden_states: Tensor,
        skip: Tensor,
        time_embedding: Tensor,
        context: Context,
    ) -> Tensor:
        """Run one residual block, and its transformer where it has one; maps are (B, C, h, w)."""
        hidden_states = torch.cat([hidden_states, skip], dim=1)
        hidden_states = self.resnets[i](hidden_states, time_embedding)
        return self.attentions[i](hidden_states, context) if self.has_attention else hidden_states


def make_down_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Build the way down; also return the widths of the skips in the order they are made."""
    widths, blocks = config.block_out_channels, nn.ModuleList()
    skips, previous = [widths[0]], widths[0]
    for level, (width, depths) in enumerate(zip(widths, config.down_depths(), strict=True)):
        layers, last = config.layers()[level], level == len(widths) - 1
        channels = [(previous if i == 0 else width, width) for i in range(layers)]
        blocks.append(DownBlock(channels, config, level=level, depths=depths, down=not last))
        skips += [width] * (layers if last else layers + 1)
        previous = width
    return blocks, skips


def make_up_blocks(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """Build the way up: one residual block more a level than on the way down."""
    widths, blocks, skips = config.block_out_channels, nn.ModuleList(), list(skips)
    previous = widths[-1]
    for i, depths in enumerate(config.up_depths()):
        level = len(widths) - 1 - i
        width, channels = widths[level], []
        for _ in range(config.layers()[level] + 1):
            channels.append((previous + skips.pop(), width))
            previous = width
        blocks.append(UpBlock(channels, config, level=level, depths=depths, up=level > 0))
    return blocks
