"""Facts of a UNet: the architecture, as diffusers' `config.json` names it, and its tensors."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import (
    Config,
    Shape,
    Sizes,
    Tensors,
    attention,
    require_among,
    require_fixed,
    require_length,
    require_multiple,
    resnet,
    weight,
)
from engine.configs.cross_attentions import CrossAttention, cross_attentions
from engine.configs.transformer_depths import (
    ATTENDING_MIDDLE,
    by_layer,
    check_depths,
    read_depths,
    where_attended,
)
from engine.configs.unet_fields import UNET_FIXED
from engine.configs.unet_memory import alive, block_activations
from engine.errors import ModelError

__all__ = ["UNetConfig", "middle_tensors", "time_tensors", "way_down_tensors"]

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = (ATTENDING_MIDDLE, "UNetMidBlock2D", None)
DOWN = (*(("CrossAttnDownBlock2D",) * 3), "DownBlock2D")  # of Stable Diffusion 1
UP = ("UpBlock2D", *(("CrossAttnUpBlock2D",) * 3))
ADDITION_EMBEDS = (None, "text", "text_time")


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig(Config):
    """A UNet with cross-attention (Rombach et al. 2022, arXiv:2112.10752, appendix E).

    mid_block_type: None for no middle, as of models that were distilled to a smaller one
    transformer_layers_per_block: blocks of each transformer: one number, by level, or by level and
        layer, and then the way up has its own, in the order in which it is run
    only_cross_attention: whether transformers attend to the text alone, in the place of positions
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = DOWN
    up_block_types: tuple[str, ...] = UP
    mid_block_type: str | None = ATTENDING_MIDDLE
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[tuple[int, ...], ...] | None = None
    only_cross_attention: bool | tuple[bool, ...] = False
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
    time_ids: int = 0  # numbers that XL is told beside the text; 0: as the widths tell

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
        check_depths(
            "transformer_layers_per_block", self.down_depths(), self.down_block_types, self.layers()
        )
        layers = [count + 1 for count in reversed(self.layers())]
        check_depths(
            "reverse_transformer_layers_per_block", self.up_depths(), self.up_block_types, layers
        )
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
        require_fixed(values, UNET_FIXED)
        return super(UNetConfig, cls).from_dict({**values, **read_depths(values, DOWN, UP)})

    @property
    def addition_time_ids(self) -> int:
        """Numbers that XL is told beside the text: 6 sizes, or 4 and a score in its refiner.

        The refiner's only text encoder gives both the context and the pooled text.
        """
        if self.time_ids:
            return self.time_ids
        pooled = self.projection_class_embeddings_input_dim - 5 * self.addition_time_embed_dim
        return 5 if pooled == self.cross_attention_dim else 6

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """XL's second conditioning, LCM's guidance scale, and what is seen of a picture."""
        names = ["text_embeds", "time_ids"] if self.addition_embed_type == "text_time" else []
        if self.time_cond_proj_dim:
            names.append("timestep_cond")
        if self.in_channels > self.out_channels:
            edits = self.in_channels == 2 * self.out_channels
            names.append("edited_image" if edits else "image_conditioning")
        return tuple(names)

    @property
    def latent_multiple(self) -> int:
        """A side of the latents that every level halves evenly."""
        return int(2 ** len(self.block_out_channels))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' UNet2DConditionModel."""
        return dict(_tensors(self))

    def symbols(self) -> dict[str, int]:
        """Return the widths of the latent, the texts and whatever else the UNet is told."""
        times = self.addition_time_ids * self.addition_time_embed_dim
        return {
            "C": self.out_channels,
            "D": self.cross_attention_dim,
            "E": self.time_cond_proj_dim,
            "F": self.block_out_channels[0],
            "P": self.projection_class_embeddings_input_dim - times,
            "T": self.addition_time_ids,
            "X": self.in_channels - self.out_channels,
        }

    def residual_widths(self) -> list[list[int]]:
        """Return the channels of every map that a ControlNet adds to one: skips, then the middle.

        By level: what comes into it, and what each of its residual blocks leaves.
        """
        widths, before = [], self.block_out_channels[0]
        for channels, layers in zip(self.block_out_channels, self.layers(), strict=True):
            widths.append([before, *[channels] * layers])
            before = channels
        widths[-1] += [before] if self.mid_block_type else []
        return widths

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once; a shallow step runs the first level alone."""
        rows, latents = sizes.groups * sizes.batch, sizes.height * sizes.width // 64
        if part.startswith("step_shallow"):
            width, attends = self.block_out_channels[0], 0 in self.attention_levels()
            return rows * latents * (block_activations(2 * width, width, attends) + width)
        levels = self.attention_levels()
        return rows * max(alive(self.block_out_channels, self.layers(), levels, latents))

    def tables(self, sizes: Sizes) -> int:
        """Count the registers, twice, the noise of all steps, deep features and the texts."""
        latent = sizes.batch * self.out_channels * sizes.height * sizes.width // 64
        deep = sizes.groups * latent // self.out_channels * self.block_out_channels[0]
        texts = sizes.groups * sizes.batch * sizes.tokens * self.cross_attention_dim
        return latent * (2 * sizes.registers + sizes.steps) + deep + texts

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
        return down | up | ({last} if self.middle_depth() else set())

    def layers(self) -> tuple[int, ...]:
        """Residual blocks by level, on the way down; one more on the way up."""
        return self._by_level(self.layers_per_block)

    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of the transformers on the way down, by level and layer; 0 where there is none."""
        return where_attended(by_layer(self._depths(), self.layers()), self.down_block_types)

    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of the transformers on the way up, in its order; 0 where there is none."""
        depths = self.reverse_transformer_layers_per_block or self._depths()[::-1]
        layers = by_layer(depths, [count + 1 for count in reversed(self.layers())])
        return where_attended(layers, self.up_block_types)

    def middle_depth(self) -> int:
        """Blocks of the middle's transformer; 0 if there is none."""
        lowest, attends = self._depths()[-1], self.mid_block_type == ATTENDING_MIDDLE
        return (lowest if isinstance(lowest, int) else lowest[0]) if attends else 0

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Return the layers that attend to the text, in the order of IP-Adapters."""
        ways = self.down_depths(), self.up_depths(), self.middle_depth()
        return cross_attentions(self.block_out_channels, *ways)

    def _depths(self) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        depths = self.transformer_layers_per_block
        return (depths,) * len(self.block_out_channels) if isinstance(depths, int) else depths

    def attends_to_text_alone(self, level: int | None) -> bool:
        """Whether the transformers of a level have no self-attention; the middle's (None) have."""
        chosen = self.only_cross_attention
        return level is not None and (chosen if isinstance(chosen, bool) else chosen[level])

    def _by_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


# Fields that have one entry a level when they are lists.
_BY_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "only_cross_attention",
)


def _transformer(
    name: str, width: int, layers: int, config: UNetConfig, level: int | None
) -> Tensors:
    kernel = () if config.use_linear_projection else (1, 1)
    first = config.cross_attention_dim if config.attends_to_text_alone(level) else width
    yield from weight(f"{name}.norm", width)
    yield from weight(f"{name}.proj_in", width, width, *kernel)
    for i in range(layers):
        block = f"{name}.transformer_blocks.{i}"
        yield from weight(f"{block}.norm1", width)
        yield from attention(f"{block}.attn1", width, first)
        yield from weight(f"{block}.norm2", width)
        yield from attention(f"{block}.attn2", width, config.cross_attention_dim)
        yield from weight(f"{block}.norm3", width)
        yield from weight(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from weight(f"{block}.ff.net.2", width, 4 * width)
    yield from weight(f"{name}.proj_out", width, width, *kernel)


def _tensors(config: UNetConfig) -> Tensors:
    widths = config.block_out_channels
    yield from weight("conv_in", widths[0], config.in_channels, 3, 3)
    yield from time_tensors(config)
    skips = yield from way_down_tensors(config)
    yield from middle_tensors(config)
    yield from _way_up(config, skips)
    yield from weight("conv_norm_out", widths[0])
    yield from weight("conv_out", config.out_channels, widths[0], 3, 3)


def time_tensors(config: UNetConfig) -> Tensors:
    """What turns the timestep, and what else is told with it, into one vector."""
    width, time = config.block_out_channels[0], 4 * config.block_out_channels[0]
    yield from weight("time_embedding.linear_1", time, width)
    if config.time_cond_proj_dim:
        condition = config.time_cond_proj_dim
        yield from weight("time_embedding.cond_proj", width, condition, bias=False)
    yield from weight("time_embedding.linear_2", time, time)
    if config.addition_embed_type == "text_time":
        inputs = config.projection_class_embeddings_input_dim
        yield from weight("add_embedding.linear_1", time, inputs)
        yield from weight("add_embedding.linear_2", time, time)
    elif config.addition_embed_type == "text":
        context = config.cross_attention_dim
        yield from weight("add_embedding.norm1", context)
        yield "add_embedding.pool.positional_embedding", (1, context)
        for name in ("k_proj", "q_proj", "v_proj"):
            yield from weight(f"add_embedding.pool.{name}", context, context)
        yield from weight("add_embedding.proj", time, context)
        yield from weight("add_embedding.norm2", time)


def middle_tensors(config: UNetConfig) -> Tensors:
    """The lowest level: residual block, transformer, residual block, or less of these."""
    middle, time = config.block_out_channels[-1], 4 * config.block_out_channels[0]
    if config.mid_block_type:
        yield from resnet("mid_block.resnets.0", middle, middle, time)
    if layers := config.middle_depth():
        yield from _transformer("mid_block.attentions.0", middle, layers, config, None)
        yield from resnet("mid_block.resnets.1", middle, middle, time)


def way_down_tensors(config: UNetConfig) -> Generator[tuple[str, Shape], None, list[int]]:
    """The levels from wide to narrow; returns the widths of the skips in the order they arise."""
    widths, time = config.block_out_channels, 4 * config.block_out_channels[0]
    skips, inputs = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        block = f"down_blocks.{level}"
        for i in range(config.layers()[level]):
            yield from resnet(f"{block}.resnets.{i}", inputs, width, time)
            if layers := config.down_depths()[level][i]:
                yield from _transformer(f"{block}.attentions.{i}", width, layers, config, level)
            inputs = width
            skips.append(width)
        if level < len(widths) - 1:
            yield from weight(f"{block}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    return skips


def _way_up(config: UNetConfig, skips: Sequence[int]) -> Tensors:
    """The levels from narrow to wide; each residual block also takes the last skip that is left."""
    widths, time, left = config.block_out_channels, 4 * config.block_out_channels[0], list(skips)
    inputs = widths[-1]
    for i, depths in enumerate(config.up_depths()):
        level = len(widths) - 1 - i
        block, width = f"up_blocks.{i}", widths[level]
        for j, layers in enumerate(depths):
            yield from resnet(f"{block}.resnets.{j}", inputs + left.pop(), width, time)
            if layers:
                yield from _transformer(f"{block}.attentions.{j}", width, layers, config, level)
            inputs = width
        if level:
            yield from weight(f"{block}.upsamplers.0.conv", width, width, 3, 3)
