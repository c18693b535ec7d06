"""Facts of a model: the three parts' architectures, as their `config.json` files name them.

The field names are those of diffusers and transformers. A value that this project does not
implement is refused here, so that nothing downstream meets it.

A tiny decoder for previews is that of TAESD (Bohan, "Tiny AutoEncoder for Stable Diffusion"), which
takes the latents scaled, as they are in the sampler; diffusers calls it AutoencoderTiny.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import (
    Config,
    read_json,
    require_among,
    require_fixed,
    require_length,
    require_multiple,
)
from engine.errors import ModelError

__all__ = ["AutoencoderConfig", "Config", "TextEncoderConfig", "UNetConfig", "read_json"]

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
ADDITION_EMBEDS = (None, "text", "text_time")
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
        """Read a CLIPTextModel's configuration, with or without a projection."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig(Config):
    """A UNet with cross-attention (Rombach et al. 2022, arXiv:2112.10752, appendix E)."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*(("CrossAttnDownBlock2D",) * 3), "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *(("CrossAttnUpBlock2D",) * 3))
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0
    time_cond_proj_dim: int = 0

    def __post_init__(self) -> None:
        """Refuse what the UNet does not implement, and lists of unequal length."""
        super(UNetConfig, self).__post_init__()
        for block in self.down_block_types:
            require_among("down_block_types", block, DOWN_BLOCKS)
        for block in self.up_block_types:
            require_among("up_block_types", block, UP_BLOCKS)
        require_among("mid_block_type", self.mid_block_type, MID_BLOCKS)
        require_among("addition_embed_type", self.addition_embed_type, ADDITION_EMBEDS)
        for name in _BY_LEVEL:
            require_length(name, getattr(self, name), len(self.block_out_channels))
        for channels in self.block_out_channels:
            require_multiple(
                "block_out_channels", channels, "norm_num_groups", self.norm_num_groups
            )
        for level, channels in enumerate(self.block_out_channels):
            if level in self.attention_levels():
                heads = self.heads()[level]
                require_multiple("block_out_channels", channels, "attention_head_dim", heads)
        if self.addition_embed_type == "text":
            heads = self.addition_embed_type_num_heads
            width = self.cross_attention_dim
            require_multiple("cross_attention_dim", width, "addition_embed_type_num_heads", heads)
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if not getattr(self, name):
                    raise ModelError(
                        f"{name} is missing; addition_embed_type text_time needs it: "
                        "check the UNet's config.json"
                    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a UNet2DConditionModel's configuration; refuse variants that change the maths."""
        require_fixed(values, _UNET_FIXED)
        return super(UNetConfig, cls).from_dict(values)

    @property
    def addition_time_ids(self) -> int:
        """Numbers that XL is told beside the text: 6 sizes, or 4 and a score in its refiner.

        The refiner's only text encoder gives both the context and the pooled text.
        """
        pooled = self.projection_class_embeddings_input_dim - 5 * self.addition_time_embed_dim
        return 5 if pooled == self.cross_attention_dim else 6

    def heads(self) -> tuple[int, ...]:
        """Attention heads by level.

        diffusers calls this number `attention_head_dim` in every published configuration.
        """
        return self._by_level(self.num_attention_heads or self.attention_head_dim)

    def attention_levels(self) -> set[int]:
        """Levels that attend to the text on the way down, in the middle or on the way up."""
        last = len(self.block_out_channels) - 1
        down = {i for i, block in enumerate(self.down_block_types) if "CrossAttn" in block}
        up = {last - i for i, block in enumerate(self.up_block_types) if "CrossAttn" in block}
        return down | up | ({last} if "CrossAttn" in self.mid_block_type else set())

    def layers(self) -> tuple[int, ...]:
        """Residual blocks by level, on the way down; one more on the way up."""
        return self._by_level(self.layers_per_block)

    def transformer_layers(self) -> tuple[int, ...]:
        """Transformer blocks of each attention, by level."""
        return self._by_level(self.transformer_layers_per_block)

    def _by_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


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
    def overflows_float16(self) -> bool:
        """Whether activations leave float16's range, as those of XL's autoencoder do."""
        return self.scaling_factor == XL_SCALING_FACTOR

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (len(self.block_out_channels) - 1))


# Fields that have one entry a level when they are lists.
_BY_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
)

# Fields of diffusers' UNet configuration with the only values that are implemented.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "time_embedding_act_fn": (None,),
}

# The same for the autoencoder; the statistics are another normalisation of the latents.
_AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_AUTOENCODER_BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}


TINY_LEVELS = 4  # and twice the size between them


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoderConfig(Config):
    """The half of a tiny autoencoder that previews need; all its levels have one width."""

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Refuse widths that change, and other numbers of levels."""
        super(TinyDecoderConfig, self).__post_init__()
        widths, blocks = self.decoder_block_out_channels, self.num_decoder_blocks
        if len(widths) != TINY_LEVELS or len(blocks) != TINY_LEVELS or len(set(widths)) > 1:
            raise ModelError(
                f"a tiny decoder of the widths {widths} and blocks {blocks} is not supported; it "
                f"must have {TINY_LEVELS} levels of one width, as TAESD has"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an AutoencoderTiny's configuration; refuse variants that change the maths."""
        kind = values.get("_class_name")
        if kind != "AutoencoderTiny":
            raise ModelError(
                f"config.json is of the class {kind!r}; an AutoencoderTiny's is expected, of TAESD "
                "or its kin"
            )
        require_fixed(values, _TINY_FIXED)
        return super(TinyDecoderConfig, cls).from_dict(values)

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for."""
        return int(2 ** (TINY_LEVELS - 1))


# Fields of diffusers' configuration with the only values that are implemented.
_TINY_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "out_channels": (3,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0, None),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
