"""What every residual block of the UNet is told: the timestep, and with it text or sizes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(values: Tensor, channels: int, *, flip: bool, shift: int) -> Tensor:
    """Embed scalars (n,) as cosines and sines (n, channels) (Vaswani et al. 2017, section 3.5).

    `flip` puts the cosines first; `shift` is subtracted from the count of frequencies.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(exponent / (half - shift))[None]
    parts = (angles.cos(), angles.sin()) if flip else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers over sinusoids, optionally with an embedded guidance scale added first."""

    def __init__(self, channels: int, embedding: int, *, condition_channels: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, embedding)
        if condition_channels:
            self.cond_proj = nn.Linear(condition_channels, channels, bias=False)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, channels) -> (B, embedding); condition: (B, condition_channels) or None."""
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(sample)))


class AttentionPooling(nn.Module):
    """One vector of a sequence: its mean attends to itself and to every token."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)

    def forward(self, context: Tensor) -> Tensor:
        """(B, n, channels) -> (B, channels)."""
        summary = context.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([summary, context], dim=1)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(summary), self.k_proj(tokens), self.v_proj(tokens))
        )
        return F.scaled_dot_product_attention(query, key, value).flatten(1)


class TextEmbedding(nn.Module):
    """The pooled text as an addition to the time embedding (Saharia et al. 2022, Imagen,
    arXiv:2205.11487, section 2.3): every residual block sees it, not the attention alone.
    """

    def __init__(self, channels: int, embedding: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.pool = AttentionPooling(channels, heads)
        self.proj = nn.Linear(channels, embedding)
        self.norm2 = nn.LayerNorm(embedding)

    def forward(self, context: Tensor) -> Tensor:
        """(B, n, channels) -> (B, embedding)."""
        return self.norm2(self.proj(self.pool(self.norm1(context))))
