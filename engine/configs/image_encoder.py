"""Facts of CLIP's half for pictures, as transformers' `config.json` names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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

__all__ = ["ImageEncoderConfig"]

HIDDEN_ACTS = ("quick_gelu", "gelu")
COLOURS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoderConfig(Config):
    """CLIP's vision transformer with its projection (Radford et al. 2021, arXiv:2103.00020).

    The defaults are transformers', which files leave out; IP-Adapters have ViT-H/14 and
    ViT-bigG/14.
    """

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ("CLIPVisionModelWithProjection", "CLIPModel")
    VISION: ClassVar[str] = "vision_model"  # before the names of the transformer
    WANTED: ClassVar[str] = "the folder of an image encoder"

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
        super(ImageEncoderConfig, self).__post_init__()
        require_among("hidden_act", self.hidden_act, HIDDEN_ACTS)
        require_multiple(
            "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )
        if self.patch_size > self.image_size:
            raise ModelError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}; "
                "check the config.json"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a configuration, whose vision part is nested in that of a whole CLIP.

        Raises ModelError for another model's.
        """
        first, *_ = cls.CLASS_NAMES
        kinds = values.get("architectures") or [first]
        if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in cls.CLASS_NAMES:
            raise ModelError(f"config.json describes {kinds!r:.200}; give {cls.WANTED}, a {first}")
        vision = dict(values)
        for name in ("vision_config", "vision_config_dict"):  # the second, in old files, wins
            part = values.get(name) or {}
            if not isinstance(part, Mapping):
                raise ModelError(f"config.json has {name} = {part!r:.200}; an object is expected")
            vision |= part
        own = {"projection_dim": values.get("projection_dim", 512)}
        return super(ImageEncoderConfig, cls).from_dict({**vision, **own})

    @property
    def tokens(self) -> int:
        """Patches of a picture, and the class."""
        return int((self.image_size // self.patch_size) ** 2) + 1

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor of the graph, by the name in transformers' class."""
        return dict(self._tensors())

    def symbols(self) -> dict[str, int]:
        """Return the side of its pictures, its tokens and the widths of what it makes of them."""
        sizes = {"S": self.image_size, "P": self.projection_dim}
        return {**sizes, "M": self.tokens, "E": self.hidden_size}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in an attention."""
        scores = 2 * self.num_attention_heads * self.tokens
        return (6 * self.hidden_size + scores) * self.tokens

    def _tensors(self) -> Tensors:
        width, vision, patch = self.hidden_size, self.VISION, self.patch_size
        yield f"{vision}.embeddings.class_embedding", (width,)
        yield from weight(
            f"{vision}.embeddings.patch_embedding", width, COLOURS, patch, patch, bias=False
        )
        yield from weight(f"{vision}.embeddings.position_embedding", self.tokens, width, bias=False)
        yield from weight(f"{vision}.pre_layrnorm", width)
        for i in range(self.num_hidden_layers):
            yield from self._layer(f"{vision}.encoder.layers.{i}")
        yield from weight(f"{vision}.post_layernorm", width)
        yield from weight("visual_projection", self.projection_dim, width, bias=False)

    def _layer(self, name: str) -> Tensors:
        width = self.hidden_size
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from weight(f"{name}.self_attn.{projection}", width, width)
        yield from weight(f"{name}.layer_norm1", width)
        yield from weight(f"{name}.mlp.fc1", self.intermediate_size, width)
        yield from weight(f"{name}.mlp.fc2", width, self.intermediate_size)
        yield from weight(f"{name}.layer_norm2", width)
