"""GPT-2 (Radford et al. 2019) with a cache of keys and values.

Attribute names are those of transformers' GPT2LMHeadModel.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.gpt2 import TANH_GELU, GPT2Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    TANH_GELU: partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Conv1D(nn.Module):
    """A linear layer whose weight is kept as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal multi-head self-attention over the tokens so far and the new ones."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.scale = config.head_width**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, hidden_states: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, n_embd), past (2, B, heads, p, d), mask (n, p + n) -> the same, p + n for p."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        present = torch.cat([past, torch.stack([key, value])], dim=-2)
        out = F.scaled_dot_product_attention(
            query, present[0], present[1], attn_mask=mask, scale=self.scale
        )
        return self.c_proj(out.transpose(1, 2).flatten(2)), present


class MLP(nn.Module):
    """Two linear layers with the configured activation between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_fc = Conv1D(config.n_embd, config.inner)
        self.c_proj = Conv1D(config.inner, config.n_embd)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, n_embd) -> (B, n, n_embd)."""
        return self.c_proj(self.activation(self.c_fc(hidden_states)))


class Block(nn.Module):
    """Self-attention and MLP, each with a layer norm before it and a residual around it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Take and give what `Attention` does; the hidden states are (B, n, D)."""
        attended, present = self.attn(self.ln_1(hidden_states), past, mask)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states)), present


class Transformer(nn.Module):
    """Embeddings, blocks and the final layer norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT2(nn.Module):
    """Tokens, and what is remembered of those before them, to the logits of the next one."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits after the last token, and all keys and values.

        input_ids: (B, n) int64; past: (layers, 2, B, heads, p, d), p may be 0
        -> (B, vocab_size); (layers, 2, B, heads, p + n, d)
        """
        before, new = past.shape[-2], input_ids.shape[1]
        positions = torch.arange(before, before + new, device=input_ids.device)
        mask = torch.arange(before + new, device=input_ids.device) <= positions[:, None]
        hidden_states = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        presents = []
        for layer, block in enumerate(self.transformer.h):
            hidden_states, present = block(hidden_states, past[layer], mask)
            presents.append(present)
        last = self.transformer.ln_f(hidden_states[:, -1])
        tied = self.config.tie_word_embeddings
        head = self.transformer.wte.weight if tied else self.lm_head.weight
        return F.linear(last, head), torch.stack(presents)


class LanguageModelPart(nn.Module):
    """The graph: input_ids (B, n) int64, past float32 -> logits (B, V) and present, float32."""

    def __init__(self, gpt2: GPT2) -> None:
        super().__init__()
        self.model = gpt2

    def forward(self, input_ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Cast at the borders, as `export.parts` does; shapes are those of `GPT2.forward`."""
        logits, present = self.model(input_ids, past.to(self.model.transformer.wte.weight.dtype))
        return logits.float(), present.float()
