"""Layers that the UNet and the autoencoder share, with diffusers' attribute names.

An attribute is called what the checkpoint calls it, so state dicts load without a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two convolutions with group norm and SiLU around a residual connection.

    hidden_states: (B, in_channels, h, w) -> (B, out_channels, h, w). With `time_channels` the
    time embedding (B, time_channels) is added between the convolutions (Ho et al. 2020,
    arXiv:2006.11239, appendix B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """Return the output (B, C, h, w) of the residual block; see the class."""
        x = self.conv1(F.silu(self.norm1(hidden_states)))
        if time_embedding is not None:
            x = x + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        x = self.conv2(F.silu(self.norm2(x)))
        return x + (self.conv_shortcut(hidden_states) if self.has_shortcut else hidden_states)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution.

    The autoencoder pads right and bottom only (`asymmetric`), the UNet all around.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h // 2, w // 2)."""
        if self.asymmetric:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample(nn.Module):
    """Repeat every value to `size` (twice as large by default), then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w), or to `size` where the level below was odd."""
        if size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=size, mode="nearest")
        return self.conv(hidden_states)


class Attention(nn.Module):
    """Multi-head attention over tokens (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    hidden_states: (B, n, channels); context: (B, m, context_channels), or None for
    self-attention. Returns (B, n, channels).
    """

    def __init__(
        self, channels: int, heads: int, *, context_channels: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        context_channels = channels if context_channels is None else context_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        images: "LayerImages | None" = None,
    ) -> Tensor:
        """Attend from `hidden_states` (B, n, D) to `context` (B, m, D') and pictures; see above."""
        context = hidden_states if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(hidden_states), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(query, key, value)
        if images is not None:
            out = out + images.attended(query)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImages:
    """Pictures that one layer attends to (Ye et al. 2023, arXiv:2308.06721, equation 5).

    keys, values: (B, k, t, C) of k pictures with t tokens each; bias: (B, k, t), -inf for a token
    that only fills up; weights: (B, k, n), how much each picture counts at each place
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    weights: Tensor

    def attended(self, query: Tensor) -> Tensor:
        """Attend from (B, heads, n, d) to each picture by itself; returns their weighed sum."""
        heads, pictures, tokens = query.shape[1], self.keys.shape[1], self.keys.shape[2]
        keys, values = (
            tensor.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
            for tensor in (self.keys, self.values)
        )
        scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        scores = scores.unflatten(-1, (pictures, tokens)) + self.bias[:, None, None]
        shares = scores.float().softmax(dim=-1).to(query.dtype)
        shares = shares * self.weights.transpose(1, 2)[:, None, :, :, None]
        return shares.flatten(3) @ values


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAndImages:
    """What a UNet attends to: a text (B, m, D), and pictures.

    keys, values: (B, k, t, W), those of all layers behind each other; bias: (B, k, t)
    weights: (B, k, h, w) by level
    """

    text: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    weights: Mapping[int, Tensor]

    def layer(self, level: int, begin: int, width: int) -> LayerImages:
        """Return the pictures of a layer, whose keys begin at a column."""
        return LayerImages(
            keys=self.keys[..., begin : begin + width],
            values=self.values[..., begin : begin + width],
            bias=self.bias,
            weights=self.weights[level].flatten(2),
        )


Context = Tensor | TextAndImages
"""What transformers attend to: (B, m, D), or that with pictures."""


def for_groups(values: Tensor, groups: int | None) -> Tensor:
    """Repeat a batch for each group of the conditioning: (B, …) -> (g · B, …); None as it is."""
    if groups is None:
        return values
    return values[None].expand(groups, *values.shape).flatten(0, 1)


def resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bring maps (B, C, h, w) to another size, as torch's bicubic interpolation does."""
    return F.interpolate(values, size=size, mode="bicubic", align_corners=False)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, channels) -> (B, n, hidden)."""
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return value * F.gelu(gate)
