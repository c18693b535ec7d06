"""Facts of text encoders other than CLIP: BERT, T5's encoder and GPT-2's states.

A model's folder has one in the place of CLIP, as transformers saves it; the UNet attends to its
last hidden states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import Config, Shape, Tensors, require_among, require_fixed, weight
from engine.configs.diffusion import TextEncoderConfig

__all__ = ["OTHER_TEXT_ENCODERS", "BertConfig", "GPT2TextConfig", "T5Config"]

UNUSED_BERT = r"pooler\.dense\.(weight|bias)|embeddings\.(position_ids|token_type_ids)"
UNUSED_T5 = r"encoder\.embed_tokens\.weight"
UNUSED_GPT2 = r"h\.\d+\.attn\.(bias|masked_bias)"


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig(TextEncoderConfig):
    """A BERT (Devlin et al. 2018, arXiv:1810.04805), such as MiniLM; its pooled text is the mean.

    pad_token_id: of tokens that nothing attends to
    """

    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse what the text encoder does not implement."""
        super(BertConfig, self).__post_init__()
        require_among("hidden_act", self.hidden_act, ("gelu",))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a BertModel's configuration; raises ModelError for a variant of it."""
        require_fixed(values, {"position_embedding_type": ("absolute",), "is_decoder": (False,)})
        return super(TextEncoderConfig, cls).from_dict({**values, **FIXED})

    @property
    def final_norm(self) -> str | None:
        """The norm of a layer is its last step."""
        return None

    @property
    def unused(self) -> str | None:
        """A pattern of tensors that a file may hold beside those that are used."""
        return UNUSED_BERT

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in transformers' BertModel."""
        return dict(_bert(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(TextEncoderConfig):
    """The encoder of a T5 (Raffel et al. 2019, arXiv:1910.10683), 1.0 or 1.1.

    d_kv: width of a head; gated: GEGLU in the place of ReLU (Shazeer 2020, arXiv:2002.05202)
    pad_token_id: of tokens that nothing attends to
    """

    max_position_embeddings: int = 512
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-6
    d_kv: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    gated: bool = False
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse what the text encoder does not implement."""
        Config.__post_init__(self)
        require_among("feed_forward_proj", self.feed_forward_proj, ("relu", "gated-gelu"))

    @property
    def feed_forward_proj(self) -> str:
        """The activation as transformers names it."""
        return "gated-gelu" if self.gated else self.hidden_act

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a T5EncoderModel's configuration; raises ModelError for another activation."""
        given = {T5_NAMES.get(name, name): value for name, value in values.items()}
        kind = values.get("feed_forward_proj", "relu")
        given |= {"gated": kind == "gated-gelu", "hidden_act": "relu"}
        require_among("feed_forward_proj", kind, ("relu", "gated-gelu"))
        return super(TextEncoderConfig, cls).from_dict({**given, **FIXED})

    @property
    def final_norm(self) -> str | None:
        """The graph applies it to all states."""
        return None

    @property
    def unused(self) -> str | None:
        """A pattern of tensors that a file may hold beside those that are used."""
        return UNUSED_T5

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in transformers' T5EncoderModel."""
        return dict(_t5(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2TextConfig(TextEncoderConfig):
    """The states of a GPT-2 (Radford et al. 2019); its pooled text is the state at the end."""

    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"

    def __post_init__(self) -> None:
        """Refuse what the text encoder does not implement."""
        Config.__post_init__(self)
        require_among("activation_function", self.hidden_act, ("gelu_new",))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a GPT2Model's configuration; raises ModelError for another activation."""
        given = {GPT2_NAMES.get(name, name): value for name, value in values.items()}
        if not given.get("intermediate_size"):
            given["intermediate_size"] = 4 * int(given.get("hidden_size", 768))
        return super(TextEncoderConfig, cls).from_dict({**given, "projection_dim": 0})

    @property
    def final_norm(self) -> str | None:
        """The graph applies it to all states."""
        return None

    @property
    def unused(self) -> str | None:
        """A pattern of tensors that a file may hold beside those that are used."""
        return UNUSED_GPT2

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in transformers' GPT2Model."""
        return dict(_gpt2(self))


FIXED = {"projection_dim": 0, "eos_token_id": 2}  # CLIP's, which these do not use
T5_NAMES = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
# By the `model_type` of config.json: the class, transformers' own, and other names of its fields.
OTHER_TEXT_ENCODERS: Mapping[str, tuple[type[TextEncoderConfig], str, Mapping[str, str]]] = {
    "bert": (BertConfig, "BertModel", {}),
    "t5": (T5Config, "T5EncoderModel", T5_NAMES),
    "gpt2": (GPT2TextConfig, "GPT2Model", GPT2_NAMES),
}


def _bert(config: BertConfig) -> Tensors:
    width, hidden = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings.weight", (config.vocab_size, width)
    yield "embeddings.position_embeddings.weight", (config.max_position_embeddings, width)
    yield "embeddings.token_type_embeddings.weight", (config.type_vocab_size, width)
    yield from weight("embeddings.LayerNorm", width)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from weight(f"{layer}.attention.self.{name}", width, width)
        yield from weight(f"{layer}.attention.output.dense", width, width)
        yield from weight(f"{layer}.attention.output.LayerNorm", width)
        yield from weight(f"{layer}.intermediate.dense", hidden, width)
        yield from weight(f"{layer}.output.dense", width, hidden)
        yield from weight(f"{layer}.output.LayerNorm", width)


def _t5(config: T5Config) -> Tensors:
    width, hidden = config.hidden_size, config.intermediate_size
    inner = config.num_attention_heads * config.d_kv
    yield "shared.weight", (config.vocab_size, width)
    for i in range(config.num_hidden_layers):
        first, second = (f"encoder.block.{i}.layer.{place}" for place in (0, 1))
        for name in ("q", "k", "v"):
            yield from weight(f"{first}.SelfAttention.{name}", inner, width, bias=False)
        yield from weight(f"{first}.SelfAttention.o", width, inner, bias=False)
        if i == 0:
            buckets = config.relative_attention_num_buckets
            bias = f"{first}.SelfAttention.relative_attention_bias.weight"
            yield bias, (buckets, config.num_attention_heads)
        yield from weight(f"{first}.layer_norm", width, bias=False)
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            yield from weight(f"{second}.DenseReluDense.{name}", hidden, width, bias=False)
        yield from weight(f"{second}.DenseReluDense.wo", width, hidden, bias=False)
        yield from weight(f"{second}.layer_norm", width, bias=False)
    yield from weight("encoder.final_layer_norm", width, bias=False)


def _gpt2(config: GPT2TextConfig) -> Tensors:
    width, hidden = config.hidden_size, config.intermediate_size
    yield "wte.weight", (config.vocab_size, width)
    yield "wpe.weight", (config.max_position_embeddings, width)
    for i in range(config.num_hidden_layers):
        yield from weight(f"h.{i}.ln_1", width)
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
        ):
            yield f"h.{i}.{name}.weight", (inputs, outputs)
            yield f"h.{i}.{name}.bias", (outputs,)
        yield from weight(f"h.{i}.ln_2", width)
        for name, inputs, outputs in (
            ("mlp.c_fc", width, hidden),
            ("mlp.c_proj", hidden, width),
        ):
            yield f"h.{i}.{name}.weight", (inputs, outputs)
            yield f"h.{i}.{name}.bias", (outputs,)
    yield from weight("ln_f", width)
