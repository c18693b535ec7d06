"""The denoising UNet with cross-attention (Rombach et al. 2022, arXiv:2112.10752).

Attribute names are those of diffusers' UNet2DConditionModel, so its state dict loads strictly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.diffusion import UNetConfig
from export.modules.embeddings import TextEmbedding, TimestepEmbedding, sinusoids
from export.modules.layers import Context, TextAndImages, for_groups, resized
from export.modules.unet_blocks import (
    MidBlock,
    TransformerBlock,
    UpBlock,
    make_down_blocks,
    make_up_blocks,
)

SHRUNK_FROM = 1  # the level whose input deep shrink halves


class UNetEncoder(nn.Module):
    """A UNet's way down and its middle, which a ControlNet has too.

    begins_alike: whether nothing is told of the text before the first transformer
    widths: of the maps that the way down leaves for the way up, in the order in which they arise
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        embedding = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            widths[0], embedding, condition_channels=config.time_cond_proj_dim
        )
        if config.addition_embed_type == "text_time":
            self.add_embedding: nn.Module = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, embedding
            )
        elif config.addition_embed_type == "text":
            self.add_embedding = TextEmbedding(
                config.cross_attention_dim, embedding, config.addition_embed_type_num_heads
            )
        self.down_blocks, self.widths = make_down_blocks(config)
        if config.mid_block_type:
            depth = config.middle_depth()
            channels = [(widths[-1], widths[-1])] * (2 if depth else 1)
            self.mid_block = MidBlock(channels, config, level=None, depths=(depth,))
        has_attention = config.down_block_types[0] == "CrossAttnDownBlock2D"
        self.begins_alike = has_attention and config.addition_embed_type is None

    def encode(
        self,
        first: Tensor,
        time_embedding: Tensor,
        context: Context,
        groups: int | None = None,
        *,
        shrinks: bool = False,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Go down from the first convolution's (B, C, h, w) and through the middle.

        Returns (B, C', h', w'), the maps on the way after the first convolution's, and the time
        embedding; for groups and shrinks see `UNet.with_deep`.
        """
        hidden_states, skips = first, []
        for level, block in enumerate(self.down_blocks):
            if shrinks and level == SHRUNK_FROM:
                height, width = hidden_states.shape[2:]
                hidden_states = resized(hidden_states, (height // 2, width // 2))
            hidden_states, more = block(hidden_states, time_embedding, context, groups)
            time_embedding, groups = for_groups(time_embedding, groups), None
            skips += more
        if self.config.mid_block_type:
            hidden_states = self.mid_block(hidden_states, time_embedding, context)
        return hidden_states, skips, time_embedding

    def embed_time(
        self, timestep: Tensor, dtype: torch.dtype, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """Embed (B,) timesteps, and (B, time_cond_proj_dim) of LCM, as (B, 4 C)."""
        waves = self._sinusoids(timestep, self.config.block_out_channels[0])
        return self.time_embedding(waves.to(dtype), timestep_cond)

    def embed_text(
        self, context: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None
    ) -> Tensor:
        """Embed the pooled text, in XL also the sizes: (B, 4 C), added to the time embedding."""
        if self.config.addition_embed_type == "text":
            return self.add_embedding(context)
        assert text_embeds is not None
        assert time_ids is not None
        sizes = self._sinusoids(time_ids.flatten(), self.config.addition_time_embed_dim)
        sizes = sizes.unflatten(0, (-1, time_ids.shape[1])).flatten(1)
        added = torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=-1)
        return self.add_embedding(added.to(context.dtype))

    def _sinusoids(self, values: Tensor, channels: int) -> Tensor:
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return sinusoids(values, channels, flip=flip, shift=shift)


class UNet(UNetEncoder):
    """Predict noise, velocity or picture, as it was trained, from a noisy latent and a text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        self.up_blocks = make_up_blocks(config, self.widths)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        begin = 0
        for layer in config.cross_attentions():
            block = self.get_submodule(layer.name)
            assert isinstance(block, TransformerBlock)
            block.place = (layer.level, begin, layer.width)
            begin += layer.width

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, **added: Any) -> Tensor:
        """Return (B, out_channels, h, w); the arguments are those of `with_deep`."""
        return self.with_deep(sample, timestep, context, **added)[0]

    def with_deep(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        groups: int | None = None,
        deep: Tensor | None = None,
        shrinks: bool = False,
        residuals: Sequence[Tensor] = (),
        images: Sequence[Tensor] = (),
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (B, out_channels, h, w), and the deep features that it was made from.

        sample: (B, in_channels, h, w); timestep: (B,); context: (B, m, cross_attention_dim).
        text_embeds (B, p) and time_ids (B, 6) are XL's pooled text and sizes in pixels;
        timestep_cond: (B, time_cond_proj_dim) is the embedded guidance scale of LCM.
        groups: g, with the texts of each, g · B in context, text_embeds and time_ids; what comes
        before the first of these is computed once, and all that is returned is g · B as well.
        deep: (B, block_out_channels[0], h, w), what the last residual block takes beside the first
        skip. Given those of an earlier call, only what lies around them is computed (Ma et al.
        2024, DeepCache, arXiv:2312.00858, section 3.3, with the uppermost skip).
        shrinks: whether all below the first level sees half the height and width of what came
        before, which is enlarged again where it meets the whole size (Kohya's deep shrink, 2023).
        residuals: by level (B, C, h, w), what is added to the level's skips and behind the middle,
        channels behind channels (Zhang et al. 2023, arXiv:2302.05543, section 3.2).
        images: what is attended to beside the text, for all B: keys (B, k, t, W), values and bias,
        then the weights (g · B, k, h, w) of each level that attends, as `TextAndImages` has them.
        """
        time_embedding = self.embed_time(timestep, sample.dtype, timestep_cond)
        first = self.conv_in(sample)
        levels = zip(residuals, self.config.residual_widths(), strict=False)
        added = [piece for level, widths in levels for piece in level.split(widths, dim=1)]
        attended = self._attended(context, images, groups)
        if deep is None and self.begins_alike:
            deep = self._deep(first, time_embedding, attended, groups, added[1:], shrinks)
        first, time_embedding = for_groups(first, groups), for_groups(time_embedding, groups)
        if self.config.addition_embed_type is not None:
            time_embedding = time_embedding + self.embed_text(context, text_embeds, time_ids)
        if deep is None:
            deep = self._deep(first, time_embedding, attended, None, added[1:], shrinks)
        if added:
            first = first + added[0]
        top = self.up_blocks[-1]
        assert isinstance(top, UpBlock)
        hidden_states = top.layer(-1, deep, first, time_embedding, attended)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states))), deep

    def _attended(self, text: Tensor, images: Sequence[Tensor], groups: int | None) -> Context:
        """Lay pictures beside the text of each group."""
        if not images:
            return text
        keys, values, bias = (for_groups(tensor, groups) for tensor in images[:3])
        levels = sorted({layer.level for layer in self.config.cross_attentions()})
        weights = dict(zip(levels, images[3:], strict=True))
        return TextAndImages(text=text, keys=keys, values=values, bias=bias, weights=weights)

    def _deep(
        self,
        first: Tensor,
        time_embedding: Tensor,
        context: Context,
        groups: int | None,
        added: Sequence[Tensor],
        shrinks: bool,
    ) -> Tensor:
        """Run all but the last residual block, which alone sees the first skip."""
        hidden_states, skips, time_embedding = self.encode(
            first, time_embedding, context, groups, shrinks=shrinks
        )
        whole = self.config.layers()[0] + 1 if shrinks else None
        if added:
            skips = [skip + piece for skip, piece in zip(skips, added, strict=False)]
        if len(added) > len(skips):
            hidden_states = hidden_states + added[-1]
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, time_embedding, context, whole)
        return hidden_states
