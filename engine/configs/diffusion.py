"""Facts of a model: the parts' architectures, as their `config.json` files name them.

The names of fields and tensors are those of diffusers and transformers. A value that this project
does not implement is refused here, so that nothing downstream meets it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import (
    Config,
    Shape,
    Sizes,
    Tensors,
    attention,
    read_json,
    require_among,
    require_fixed,
    require_length,
    require_multiple,
    resnet,
    resnet_activations,
    weight,
)
from engine.configs.identity_autoencoder import IDENTITY_CLASS, IdentityAutoencoderConfig
from engine.configs.tiny_autoencoder import TINY_CLASS, TinyAutoencoderConfig, TinyDecoderConfig
from engine.configs.unet import UNetConfig
from engine.errors import ModelError

__all__ = [
    "AUTOENCODERS",
    "AnyAutoencoder",
    "AutoencoderConfig",
    "Config",
    "IdentityAutoencoderConfig",
    "TextEncoderConfig",
    "TinyAutoencoderConfig",
    "TinyDecoderConfig",
    "UNetConfig",
    "read_json",
]

# The classes of autoencoders beside AutoencoderKL, by their names in config.json.
AUTOENCODERS: Mapping[str, type[TinyAutoencoderConfig] | type[IdentityAutoencoderConfig]] = {
    TINY_CLASS: TinyAutoencoderConfig,
    IDENTITY_CLASS: IdentityAutoencoderConfig,
}
HIDDEN_ACTS = ("quick_gelu", "gelu")
XL_SCALING_FACTOR = 0.13025
LARGEST_ID = 2  # as the end of text old configurations name token 2, and mean the largest id
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig(Config):
    """A CLIP text transformer (Radford et al. 2021, arXiv:2103.00020) or an OpenCLIP one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LARGEST_ID
    projection_dim: int = 0  # 0: no `text_projection`; set by `from_dict`

    def __post_init__(self) -> None:
        """Refuse what the text encoder does not implement."""
        super(TextEncoderConfig, self).__post_init__()
        require_among("hidden_act", self.hidden_act, HIDDEN_ACTS)
        require_multiple(
            "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a CLIPTextModel's configuration, with or without a projection.

        Raises ModelError when it is of another class, or states no projection where one is needed.
        """
        values = dict(values)
        if values.get("eos_token_id") == values.get("vocab_size", 0) - 1:
            values["eos_token_id"] = LARGEST_ID  # two ways to say the same
        architecture = values.get("architectures") or TEXT_ENCODERS[0]
        if isinstance(architecture, list):
            architecture = architecture[0]
        require_among("architectures", architecture, TEXT_ENCODERS)
        if architecture == "CLIPTextModel":
            values["projection_dim"] = 0  # stated there too, and not used
        elif not values.get("projection_dim"):
            raise ModelError(
                f"projection_dim is {values.get('projection_dim')!r}; a {architecture} needs one: "
                "check the text encoder's config.json"
            )
        return super(TextEncoderConfig, cls).from_dict(values)

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a chunk of text, which the encoder reads whole."""
        return self.max_position_embeddings

    @property
    def final_norm(self) -> str | None:
        """The layer norm of the last states, which the graph does not apply to those before."""
        return "text_model.final_layer_norm"

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by its name in transformers.

        CLIPTextModel's are under `text_model.`, as CLIPTextModelWithProjection's are.
        """
        return dict(_text_encoder(self))

    def symbols(self) -> dict[str, int]:
        """Return the widths of the states and of the pooled text, and the vocabulary's size."""
        pooled = self.projection_dim or self.hidden_size
        return {"D": self.hidden_size, "P": pooled, "V": self.vocab_size}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in an MLP, around its residual."""
        width = 2 * self.hidden_size + 2 * self.intermediate_size
        return sizes.groups * sizes.batch * sizes.tokens * width


def _text_encoder(config: TextEncoderConfig) -> Tensors:
    width, hidden = config.hidden_size, config.intermediate_size
    yield "text_model.embeddings.token_embedding.weight", (config.vocab_size, width)
    positions = config.max_position_embeddings
    yield "text_model.embeddings.position_embedding.weight", (positions, width)
    for i in range(config.num_hidden_layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from weight(f"{layer}.self_attn.{name}", width, width)
        yield from weight(f"{layer}.layer_norm1", width)
        yield from weight(f"{layer}.mlp.fc1", hidden, width)
        yield from weight(f"{layer}.mlp.fc2", width, hidden)
        yield from weight(f"{layer}.layer_norm2", width)
    yield from weight("text_model.final_layer_norm", width)
    if config.projection_dim:
        yield "text_projection.weight", (config.projection_dim, width)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig(Config):
    """A variational autoencoder with a KL term (Rombach et al. 2022, arXiv:2112.10752)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse widths that the group normalisation cannot divide."""
        super(AutoencoderConfig, self).__post_init__()
        for channels in self.block_out_channels:
            require_multiple(
                "block_out_channels", channels, "norm_num_groups", self.norm_num_groups
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an AutoencoderKL's configuration; refuse variants that change the maths."""
        require_fixed(values, _AUTOENCODER_FIXED)
        config = super(AutoencoderConfig, cls).from_dict(values)
        for name, block in _AUTOENCODER_BLOCKS.items():
            blocks = values.get(name, [block] * len(config.block_out_channels))
            require_length(name, blocks, len(config.block_out_channels))
            for given in blocks if isinstance(blocks, tuple | list) else (blocks,):
                require_among(name, given, (block,))
        return config

    @property
    def draws_posterior(self) -> bool:
        """Whether latents of a picture are drawn from a distribution that the encoder gives."""
        return True

    @property
    def overflows_float16(self) -> bool:
        """Whether activations leave float16's range, as those of XL's autoencoder do."""
        return self.scaling_factor == XL_SCALING_FACTOR

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' AutoencoderKL."""
        return dict(_autoencoder(self))

    def symbols(self) -> dict[str, int]:
        """Return the channels of the latents."""
        return {"C": self.latent_channels}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once, in the largest block of all levels."""
        return max(_alive(self, part, sizes.pixels))


AnyAutoencoder = AutoencoderConfig | TinyAutoencoderConfig | IdentityAutoencoderConfig


# Fields of diffusers' configuration with the only values that are implemented; the statistics are
# another normalisation of the latents.
_AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_AUTOENCODER_BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}


def _autoencoder(config: AutoencoderConfig) -> Tensors:
    down, latent = config.block_out_channels, config.latent_channels
    up, layers = down[::-1], config.layers_per_block
    yield from weight("encoder.conv_in", down[0], config.in_channels, 3, 3)
    yield from _levels("encoder.down_blocks", "downsamplers", down, layers)
    yield from _middle("encoder.mid_block", down[-1], config)
    yield from weight("encoder.conv_norm_out", down[-1])
    yield from weight("encoder.conv_out", 2 * latent, down[-1], 3, 3)
    yield from weight("decoder.conv_in", up[0], latent, 3, 3)
    yield from _middle("decoder.mid_block", up[0], config)
    yield from _levels("decoder.up_blocks", "upsamplers", up, layers + 1)
    yield from weight("decoder.conv_norm_out", up[-1])
    yield from weight("decoder.conv_out", config.out_channels, up[-1], 3, 3)
    if config.use_quant_conv:
        yield from weight("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if config.use_post_quant_conv:
        yield from weight("post_quant_conv", latent, latent, 1, 1)


def _levels(name: str, resampler: str, widths: Sequence[int], layers: int) -> Tensors:
    inputs = widths[0]
    for level, width in enumerate(widths):
        for i in range(layers):
            yield from resnet(f"{name}.{level}.resnets.{i}", inputs, width)
            inputs = width
        if level < len(widths) - 1:
            yield from weight(f"{name}.{level}.{resampler}.0.conv", width, width, 3, 3)


def _middle(name: str, width: int, config: AutoencoderConfig) -> Tensors:
    yield from resnet(f"{name}.resnets.0", width, width)
    if config.mid_block_add_attention:
        yield from weight(f"{name}.attentions.0.group_norm", width)
        yield from attention(f"{name}.attentions.0", width, width, bias=True)
    yield from resnet(f"{name}.resnets.1", width, width)


def _alive(config: AutoencoderConfig, part: str, pixels: int) -> Iterator[int]:
    """Go through the levels; yields the numbers alive in the largest block of each."""
    widths = config.block_out_channels
    for level, width in enumerate(widths):
        area = pixels // 4**level
        wider = widths[min(level + 1, len(widths) - 1)]
        narrower = widths[max(level - 1, 0)]
        if part == "vae_encoder":
            yield resnet_activations(narrower, width) * area
        else:  # what comes from below is enlarged before it is narrowed
            yield max(2 * wider, resnet_activations(wider, width)) * area
