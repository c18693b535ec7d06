"""Facts of a GPT-2: the architecture, as transformers' `config.json` names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import Config, Shape, Tensors, require_multiple, weight
from engine.errors import ModelError

__all__ = ["GPT2Config"]

TANH_GELU = "gelu_new"
ACTIVATIONS = (TANH_GELU, "gelu", "relu")


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(Config):
    """A causal language model (Radford et al. 2019, "Language Models are Unsupervised
    Multitask Learners").

    n_inner: width of the MLPs; 0 stands for 4 · n_embd
    tie_word_embeddings: whether the embedding also gives the logits; the weights tell it
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0
    activation_function: str = TANH_GELU
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuse what the language model does not implement."""
        super(GPT2Config, self).__post_init__()
        require_multiple("n_embd", self.n_embd, "n_head", self.n_head)
        if self.activation_function not in ACTIVATIONS:
            raise ModelError(
                f"activation_function is {self.activation_function!r}; supported are "
                f"{', '.join(ACTIVATIONS)}: use another GPT-2"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a GPT2LMHeadModel's configuration; raises ModelError for another model's."""
        kind = values.get("model_type", "gpt2")
        if kind != "gpt2" or values.get("add_cross_attention"):
            described = "gpt2 with cross-attention" if kind == "gpt2" else kind
            raise ModelError(
                f"config.json describes a {described}; use GPT-2, distilgpt2 or a model that was "
                "fine-tuned from one of them"
            )
        values = dict(values)
        if values.get("activation_function") == "gelu_pytorch_tanh":
            values["activation_function"] = TANH_GELU  # two names of one function
        if values.get("n_inner") == 4 * values.get("n_embd", 768):
            values["n_inner"] = 0
        return super(GPT2Config, cls).from_dict(values)

    @property
    def inner(self) -> int:
        """Width of the MLPs."""
        return self.n_inner or 4 * self.n_embd

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in transformers' GPT2LMHeadModel."""
        return dict(_language_model(self))

    def symbols(self) -> dict[str, int]:
        """Return the layers, the heads and their width, and the size of the vocabulary."""
        return {"l": self.n_layer, "a": self.n_head, "d": self.head_width, "V": self.vocab_size}


def _language_model(config: GPT2Config) -> Tensors:
    """GPT-2 keeps the weights of its projections as (inputs, outputs)."""
    width = config.n_embd
    yield "transformer.wte.weight", (config.vocab_size, width)
    yield "transformer.wpe.weight", (config.n_positions, width)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        yield from weight(f"{block}.ln_1", width)
        yield from _projection(f"{block}.attn.c_attn", width, 3 * width)
        yield from _projection(f"{block}.attn.c_proj", width, width)
        yield from weight(f"{block}.ln_2", width)
        yield from _projection(f"{block}.mlp.c_fc", width, config.inner)
        yield from _projection(f"{block}.mlp.c_proj", config.inner, width)
    yield from weight("transformer.ln_f", width)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)


def _projection(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)
