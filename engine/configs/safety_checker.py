"""Facts of a safety checker: CLIP's half for pictures, as transformers' `config.json` names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import (
    Config,
    Shape,
    Sizes,
    Tensors,
    require_among,
    require_multiple,
    weight,
)
from engine.errors import ModelError

__all__ = ["SafetyCheckerConfig"]

CLASS_NAME = "StableDiffusionSafetyChecker"
HIDDEN_ACTS = ("quick_gelu", "gelu")
COLOURS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyCheckerConfig(Config):
    """CLIP's vision transformer with its projection (Radford et al. 2021, arXiv:2103.00020).

    The defaults are transformers', which files leave out; the published checker is ViT-L/14.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        """Refuse what the graph does not compute."""
        super(SafetyCheckerConfig, self).__post_init__()
        require_among("hidden_act", self.hidden_act, HIDDEN_ACTS)
        require_multiple(
            "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )
        if self.patch_size > self.image_size:
            raise ModelError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}; "
                "check the safety checker's config.json"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a StableDiffusionSafetyChecker's configuration, whose vision part is nested.

        Raises ModelError for another model's.
        """
        kinds = values.get("architectures") or [CLASS_NAME]
        if kinds != [CLASS_NAME]:
            raise ModelError(
                f"config.json describes {kinds!r}; give the folder safety_checker/ of a model in "
                f"diffusers' layout, a {CLASS_NAME}"
            )
        vision: dict[str, Any] = {}
        for name in ("vision_config", "vision_config_dict"):  # the second, in old files, wins
            part = values.get(name) or {}
            if not isinstance(part, Mapping):
                raise ModelError(f"config.json has {name} = {part!r}; an object is expected")
            vision |= part
        own = {"projection_dim": values.get("projection_dim", 512)}
        return super(SafetyCheckerConfig, cls).from_dict({**vision, **own})

    @property
    def tokens(self) -> int:
        """Patches of a picture, and the class."""
        return int((self.image_size // self.patch_size) ** 2) + 1

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor of the graph, by the name in diffusers' class."""
        return dict(_checker(self))

    def symbols(self) -> dict[str, int]:
        """Return the side of its pictures and the width of what it makes of them."""
        return {"S": self.image_size, "P": self.projection_dim}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in an attention."""
        scores = 2 * self.num_attention_heads * self.tokens
        return (6 * self.hidden_size + scores) * self.tokens


def _checker(config: SafetyCheckerConfig) -> Tensors:
    width, vision = config.hidden_size, "vision_model.vision_model"
    yield f"{vision}.embeddings.class_embedding", (width,)
    patch = config.patch_size
    yield from weight(
        f"{vision}.embeddings.patch_embedding", width, COLOURS, patch, patch, bias=False
    )
    yield from weight(f"{vision}.embeddings.position_embedding", config.tokens, width, bias=False)
    yield from weight(f"{vision}.pre_layrnorm", width)
    for i in range(config.num_hidden_layers):
        layer = f"{vision}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from weight(f"{layer}.self_attn.{name}", width, width)
        yield from weight(f"{layer}.layer_norm1", width)
        yield from weight(f"{layer}.mlp.fc1", config.intermediate_size, width)
        yield from weight(f"{layer}.mlp.fc2", width, config.intermediate_size)
        yield from weight(f"{layer}.layer_norm2", width)
    yield from weight(f"{vision}.post_layernorm", width)
    yield from weight("visual_projection", config.projection_dim, width, bias=False)
