"""A union of ControlNets: one for pictures of several types, which it is told.

(xinsir 2024, controlnet-union-sdxl-1.0.) Attribute names are those of diffusers'
ControlNetUnionModel, so its state dict loads strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.control_net_union import ControlNetUnionConfig
from export.modules.control_net import ControlNet
from export.modules.embeddings import TimestepEmbedding


class SingleTokenAttention(nn.Module):
    """Attention of one token to itself alone, which is its value.

    The published network hands (pictures, tokens, D) to torch's nn.MultiheadAttention, which takes
    the first axis for the sequence: each token attends to its like in the pictures of the batch and
    to none of its own picture. Where all of them see one hint that is attention to equal tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * channels))
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, token: Tensor) -> Tensor:
        """(B, D) -> (B, D); of the projections to query, key and value the last third counts."""
        begin = 2 * token.shape[-1]
        weight, bias = self.in_proj_weight[begin:], self.in_proj_bias[begin:]
        return self.out_proj(F.linear(token, weight, bias))


class FeedForward(nn.Module):
    """Two linear layers with CLIP's approximation of GELU, x sigmoid(1.702 x), in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(channels, 4 * channels)
        self.c_proj = nn.Linear(4 * channels, channels)

    def forward(self, token: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        hidden = self.c_fc(token)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class ConditionBlock(nn.Module):
    """A block of the transformer over what the hint is in the mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = SingleTokenAttention(channels)
        self.ln_1 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels)
        self.ln_2 = nn.LayerNorm(channels)

    def forward(self, token: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        token = token + self.attn(self.ln_1(token))
        return token + self.mlp(self.ln_2(token))


class ControlNetUnion(ControlNet):
    """A ControlNet whose hint and time embedding depend on the type of the picture."""

    config: ControlNetUnionConfig

    def __init__(self, config: ControlNetUnionConfig) -> None:
        super().__init__(config)
        width, types = config.block_out_channels[0], config.num_control_type
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(types, width))
        self.transformer_layes = nn.ModuleList(
            ConditionBlock(width) for _ in range(config.num_trans_layer)
        )
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = TimestepEmbedding(
            types * config.addition_time_embed_dim, 4 * width
        )

    def hint(self, picture: Tensor, control_types: Tensor) -> Tensor:
        """Encode a picture (B, 3, H, W) of a type (B, K), 1 in one place: (B, F, h, w).

        No number of a step enters, so it is done once a picture.
        """
        hint = self.controlnet_cond_embedding(picture)
        mean = hint.float().mean(dim=(2, 3)).to(hint.dtype)
        token = mean + control_types.to(hint.dtype) @ self.task_embedding
        for block in self.transformer_layes:
            token = block(token)
        return hint + self.spatial_ch_projs(token)[:, :, None, None]

    def embed_types(self, control_types: Tensor) -> Tensor:
        """Embed (B, K) as what is added to the time embedding: (B, 4 F)."""
        waves = self._sinusoids(control_types.flatten(), self.config.addition_time_embed_dim)
        waves = waves.unflatten(0, (-1, control_types.shape[1])).flatten(1)
        return self.control_add_embedding(waves.to(self.conv_in.weight.dtype))
