"""Text encoders other than CLIP's: BERT, T5's encoder, and the states of GPT-2.

Attribute names are those of transformers' BertModel, T5EncoderModel and GPT2Model. All give what
`export.modules.clip.TextEncoder` gives: the last states, those before the last layer (normed as the
last ones are), and a pooled text; tokens of padding are attended to by none.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configs.gpt2 import GPT2Config
from engine.configs.text_encoders import BertConfig, GPT2TextConfig, T5Config
from export.modules.clip import embed_tokens
from export.modules.gpt2 import Attention as GPT2Attention
from export.modules.gpt2 import Block as GPT2Block
from export.modules.gpt2 import Transformer as GPT2Transformer

Encoded = tuple[Tensor, Tensor, Tensor]


def mean_of(states: Tensor, input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Return the mean state (B, D) of tokens that are no padding: (B, n, D), (B, n)."""
    counted = (input_ids != pad_token_id)[..., None].to(states.dtype)
    return (states * counted).sum(1) / counted.sum(1).clamp(min=1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads · d) -> (B, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class BertEmbeddings(nn.Module):
    """Words, positions and the first of the two kinds of sentences, added and normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None) -> Tensor:
        """(B, n) int64 -> (B, n, D); for extra_embeddings see `embed_tokens`."""
        words = embed_tokens(self.word_embeddings, input_ids, extra_embeddings)
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(words + places + self.token_type_embeddings.weight[0])


class BertOutput(nn.Module):
    """A linear layer and the norm of its sum with what came in."""

    def __init__(self, inputs: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(B, n, inputs), (B, n, D) -> (B, n, D)."""
        return self.LayerNorm(self.dense(x) + residual)


class BertSelfAttention(nn.Module):
    """Queries, keys and values."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, n, D), mask (B, 1, n, n) bool -> (B, n, D)."""
        query, key, value = (
            split_heads(project(x), self.heads) for project in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class BertLayer(nn.Module):
    """Self-attention and MLP, each with a residual and a norm behind it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        parts = {"self": BertSelfAttention(config), "output": BertOutput(width, config)}
        self.attention = nn.ModuleDict(parts)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = BertOutput(hidden, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, n, D), mask (B, 1, n, n) bool -> (B, n, D)."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertTextEncoder(nn.Module):
    """A BERT's encoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> Encoded:
        """(B, n) int64 -> (B, n, D) twice and (B, D), as the module says."""
        known = (input_ids != self.config.pad_token_id)[:, None, None]
        mask = known.expand(-1, 1, input_ids.shape[1], -1)  # ONNX Runtime's kernel repeats no row
        x = before = self.embeddings(input_ids, extra_embeddings)
        for layer in self.get_submodule("encoder.layer").children():
            before, x = x, layer(x, mask)
        return x, before, mean_of(x, input_ids, self.config.pad_token_id)


class T5Norm(nn.Module):
    """A scale by the root mean square, without a mean (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layer_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D), its statistics in float32."""
        variance = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


class T5Attention(nn.Module):
    """Self-attention without a scale, the distance of two tokens added to their score."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        inner = self.heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if has_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, self.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, n, D), bias (B, heads, n, n) -> (B, n, D)."""
        query, key, value = (
            split_heads(project(x), self.heads) for project in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Two linear layers with ReLU between them, or GEGLU with GELU's tangent."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        width, hidden, self.gated = config.hidden_size, config.intermediate_size, config.gated
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(width, hidden, bias=False))
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        if self.gated:
            gate, value = (self.get_submodule(name)(x) for name in ("wi_0", "wi_1"))
            return self.wo(F.gelu(gate, approximate="tanh") * value)
        return self.wo(F.relu(self.get_submodule("wi")(x)))


class T5Block(nn.Module):
    """Self-attention and feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        attention = {"SelfAttention": T5Attention(config, has_bias=first)}
        feed_forward = {"DenseReluDense": T5FeedForward(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({**part, "layer_norm": T5Norm(config)})
            for part in (attention, feed_forward)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, n, D), bias (B, heads, n, n) -> (B, n, D)."""
        part = self.layer.get_submodule
        x = x + part("0.SelfAttention")(part("0.layer_norm")(x), bias)
        return x + part("1.DenseReluDense")(part("1.layer_norm")(x))


class T5TextEncoder(nn.Module):
    """The encoder of a T5."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (T5Block(config, first=i == 0) for i in range(config.num_hidden_layers))
        parts = {"block": nn.ModuleList(blocks), "final_layer_norm": T5Norm(config)}
        self.encoder = nn.ModuleDict(parts)

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> Encoded:
        """(B, n) int64 -> (B, n, D) twice and (B, D), as the module says."""
        x = before = embed_tokens(self.shared, input_ids, extra_embeddings)
        known = input_ids != self.config.pad_token_id
        hidden = torch.where(known, 0.0, -1e9)[:, None, None].to(x.dtype)
        bias = self._distances(input_ids.shape[1], input_ids.device)[None].to(x.dtype) + hidden
        for block in self.get_submodule("encoder.block").children():
            before, x = x, block(x, bias)
        norm = self.encoder["final_layer_norm"]
        last = norm(x)
        return last, norm(before), mean_of(last, input_ids, self.config.pad_token_id)

    def _distances(self, count: int, device: torch.device) -> Tensor:
        """Return what is added to the scores, (heads, n, n): by buckets, large ones for far."""
        places = torch.arange(count, device=device)
        distance = places[None] - places[:, None]
        half = self.config.relative_attention_num_buckets // 2
        exact, far = half // 2, self.config.relative_attention_max_distance
        size = distance.abs()
        ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(far / exact)
        large = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(size < exact, size, large) + (distance > 0).long() * half
        place = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
        return self.get_submodule(place)(bucket).permute(2, 0, 1)


class GPT2TextEncoder(GPT2Transformer):
    """A GPT-2 whose states are attended to; a token sees itself and those before."""

    def __init__(self, config: GPT2TextConfig) -> None:
        super().__init__(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.max_position_embeddings,
                n_embd=config.hidden_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_inner=config.intermediate_size,
                layer_norm_epsilon=config.layer_norm_eps,
            )
        )
        self.config = config

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> Encoded:
        """(B, n) int64 -> (B, n, D) twice and (B, D), the state at the first end of the text."""
        words = embed_tokens(self.wte, input_ids, extra_embeddings)
        x = before = words + self.wpe.weight[: input_ids.shape[1]]
        for block in self.h:
            assert isinstance(block, GPT2Block)
            before = x
            x = x + _attend(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        last = self.ln_f(x)
        end = (input_ids == self.config.vocab_size - 1).int().argmax(-1)
        at = end[:, None, None].expand(-1, 1, last.shape[-1])
        return last, self.ln_f(before), last.gather(1, at).squeeze(1)


def _attend(attention: GPT2Attention, x: Tensor) -> Tensor:
    """Attend among all tokens at once, (B, n, D) -> (B, n, D)."""
    query, key, value = (
        split_heads(part, attention.heads) for part in attention.c_attn(x).chunk(3, dim=-1)
    )
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scale)
    return attention.c_proj(out.transpose(1, 2).flatten(2))
