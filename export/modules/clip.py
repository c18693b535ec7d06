"""The CLIP text encoder (Radford et al. 2021, arXiv:2103.00020), and OpenCLIP's variants.

Attribute names are those of transformers' CLIPTextModel and CLIPTextModelWithProjection.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.diffusion import LARGEST_ID, TextEncoderConfig


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU as the original CLIP does: x · sigmoid(1.702 x), of any shape."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def embed_tokens(
    embedding: nn.Embedding, input_ids: Tensor, extra_embeddings: Tensor | None
) -> Tensor:
    """Look tokens up: (B, n) int64 -> (B, n, D).

    extra_embeddings: (e, D), the rows of the ids from the vocabulary's size on (textual inversion,
    Gal et al. 2022, arXiv:2208.01618).
    """
    if extra_embeddings is None:
        return embedding(input_ids)
    size = embedding.num_embeddings
    tokens = embedding(input_ids.clamp(max=size - 1))
    extra = extra_embeddings.to(tokens.dtype)[(input_ids - size).clamp(min=0)]
    return torch.where((input_ids < size)[..., None], tokens, extra)


class TextEmbeddings(nn.Module):
    """Token and position embeddings, added."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> Tensor:
        """(B, n) int64 -> (B, n, hidden_size); for extra_embeddings see `embed_tokens`."""
        positions = self.position_embedding.weight[: input_ids.shape[1]]
        return embed_tokens(self.token_embedding, input_ids, extra_embeddings) + positions


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, hidden_size) -> (B, n, hidden_size); a token sees itself and those before."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the configured activation between them."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, hidden_size) -> (B, n, hidden_size)."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with a layer norm before it and a residual around it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, hidden_size) -> (B, n, hidden_size)."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class TextTransformer(nn.Module):
    """Embeddings, layers and the final layer norm."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class TextEncoder(nn.Module):
    """Token ids to the sequence that the UNet attends to, and to one pooled vector."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        if config.projection_dim:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self, input_ids: Tensor, extra_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last hidden states, those of the layer before the last, and the pooled text.

        input_ids: (B, n) int64 -> (B, n, hidden_size) after the final norm; the same shape
        before the last layer and without the norm (XL's context); (B, projection_dim) or
        (B, hidden_size): the state at the first end-of-text token, projected where the model
        has a projection.
        """
        hidden_states = penultimate = self.text_model.embeddings(input_ids, extra_embeddings)
        for layer in self.text_model.encoder.layers:
            penultimate = hidden_states
            hidden_states = layer(hidden_states)
        last = self.text_model.final_layer_norm(hidden_states)
        end = self._end(input_ids)[:, None, None].expand(-1, 1, last.shape[-1])
        pooled = last.gather(1, end).squeeze(1)
        if self.config.projection_dim:
            pooled = self.text_projection(pooled)
        return last, penultimate, pooled

    def _end(self, input_ids: Tensor) -> Tensor:
        """Find the first end of text."""
        if self.config.eos_token_id == LARGEST_ID:
            # Not above vocab_size - 1: there are the tokens of textual inversion.
            known = torch.where(input_ids < self.config.vocab_size, input_ids, 0)
            return known.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)
