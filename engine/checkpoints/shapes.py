"""The tensors of a part: every name and shape that its architecture has, in the graph's order.

The names are those of diffusers' UNet2DConditionModel, AutoencoderKL and AutoencoderTiny and of
transformers' CLIPTextModel (under `text_model.`), CLIPTextModelWithProjection and GPT2LMHeadModel.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from engine.configs.diffusion import (
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.configs.gpt2 import GPT2Config

__all__ = ["Shape", "Source", "tensor_shapes"]

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a tensor of a graph comes from: a stored one, a third of its rows, or its transpose."""

    name: str
    third: int | None = None
    transposed: bool = False

    def shape(self, stored: Shape) -> Shape | None:
        """Return the shape of what is taken from a tensor of this shape; None if it cannot be."""
        if self.third is not None:
            return (stored[0] // 3, *stored[1:]) if stored and stored[0] % 3 == 0 else None
        return stored[::-1] if self.transposed else stored

    def view(self, stored: NDArray[Any], shape: Shape) -> NDArray[Any]:
        """Take what this source means, in the graph's shape; a view wherever numpy can."""
        if self.third is not None:
            rows = stored.shape[0] // 3
            stored = stored[self.third * rows : (self.third + 1) * rows]
        return (stored.T if self.transposed else stored).reshape(shape)


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Return the shape of every tensor that a part of this architecture needs, by name."""
    if isinstance(config, UNetConfig):
        return dict(_unet(config))
    if isinstance(config, AutoencoderConfig):
        return dict(_autoencoder(config))
    if isinstance(config, GPT2Config):
        return dict(_language_model(config))
    if isinstance(config, TinyDecoderConfig):
        return dict(_tiny_decoder(config))
    assert isinstance(config, TextEncoderConfig)
    return dict(_text_encoder(config))


def _weight(name: str, *shape: int, bias: bool = True) -> Tensors:
    """A layer's weight, and a bias for each of its outputs."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _resnet(name: str, inputs: int, outputs: int, time: int = 0) -> Tensors:
    yield from _weight(f"{name}.norm1", inputs)
    yield from _weight(f"{name}.conv1", outputs, inputs, 3, 3)
    if time:
        yield from _weight(f"{name}.time_emb_proj", outputs, time)
    yield from _weight(f"{name}.norm2", outputs)
    yield from _weight(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _weight(f"{name}.conv_shortcut", outputs, inputs, 1, 1)


def _attention(name: str, width: int, context: int, *, bias: bool = False) -> Tensors:
    yield from _weight(f"{name}.to_q", width, width, bias=bias)
    yield from _weight(f"{name}.to_k", width, context, bias=bias)
    yield from _weight(f"{name}.to_v", width, context, bias=bias)
    yield from _weight(f"{name}.to_out.0", width, width)


def _transformer(name: str, width: int, layers: int, config: UNetConfig) -> Tensors:
    kernel = () if config.use_linear_projection else (1, 1)
    yield from _weight(f"{name}.norm", width)
    yield from _weight(f"{name}.proj_in", width, width, *kernel)
    for i in range(layers):
        block = f"{name}.transformer_blocks.{i}"
        yield from _weight(f"{block}.norm1", width)
        yield from _attention(f"{block}.attn1", width, width)
        yield from _weight(f"{block}.norm2", width)
        yield from _attention(f"{block}.attn2", width, config.cross_attention_dim)
        yield from _weight(f"{block}.norm3", width)
        yield from _weight(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _weight(f"{block}.ff.net.2", width, 4 * width)
    yield from _weight(f"{name}.proj_out", width, width, *kernel)


def _unet(config: UNetConfig) -> Tensors:
    widths = config.block_out_channels
    yield from _weight("conv_in", widths[0], config.in_channels, 3, 3)
    yield from _time(config)
    skips = yield from _way_down(config)
    middle, time = widths[-1], 4 * widths[0]
    yield from _resnet("mid_block.resnets.0", middle, middle, time)
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        layers = config.transformer_layers()[-1]
        yield from _transformer("mid_block.attentions.0", middle, layers, config)
        yield from _resnet("mid_block.resnets.1", middle, middle, time)
    yield from _way_up(config, skips)
    yield from _weight("conv_norm_out", widths[0])
    yield from _weight("conv_out", config.out_channels, widths[0], 3, 3)


def _time(config: UNetConfig) -> Tensors:
    """What turns the timestep, and what else is told with it, into one vector."""
    width, time = config.block_out_channels[0], 4 * config.block_out_channels[0]
    yield from _weight("time_embedding.linear_1", time, width)
    if config.time_cond_proj_dim:
        condition = config.time_cond_proj_dim
        yield from _weight("time_embedding.cond_proj", width, condition, bias=False)
    yield from _weight("time_embedding.linear_2", time, time)
    if config.addition_embed_type == "text_time":
        inputs = config.projection_class_embeddings_input_dim
        yield from _weight("add_embedding.linear_1", time, inputs)
        yield from _weight("add_embedding.linear_2", time, time)
    elif config.addition_embed_type == "text":
        context = config.cross_attention_dim
        yield from _weight("add_embedding.norm1", context)
        yield "add_embedding.pool.positional_embedding", (1, context)
        for name in ("k_proj", "q_proj", "v_proj"):
            yield from _weight(f"add_embedding.pool.{name}", context, context)
        yield from _weight("add_embedding.proj", time, context)
        yield from _weight("add_embedding.norm2", time)


def _way_down(config: UNetConfig) -> Generator[tuple[str, Shape], None, list[int]]:
    """The levels from wide to narrow; returns the widths of the skips in the order they arise."""
    widths, time = config.block_out_channels, 4 * config.block_out_channels[0]
    skips, inputs = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        block = f"down_blocks.{level}"
        for i in range(config.layers()[level]):
            yield from _resnet(f"{block}.resnets.{i}", inputs, width, time)
            if config.down_block_types[level] == "CrossAttnDownBlock2D":
                layers = config.transformer_layers()[level]
                yield from _transformer(f"{block}.attentions.{i}", width, layers, config)
            inputs = width
            skips.append(width)
        if level < len(widths) - 1:
            yield from _weight(f"{block}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    return skips


def _way_up(config: UNetConfig, skips: Sequence[int]) -> Tensors:
    """The levels from narrow to wide; each residual block also takes the last skip that is left."""
    widths, time, left = config.block_out_channels, 4 * config.block_out_channels[0], list(skips)
    inputs = widths[-1]
    for i, kind in enumerate(config.up_block_types):
        level = len(widths) - 1 - i
        block, width = f"up_blocks.{i}", widths[level]
        for j in range(config.layers()[level] + 1):
            yield from _resnet(f"{block}.resnets.{j}", inputs + left.pop(), width, time)
            if kind == "CrossAttnUpBlock2D":
                layers = config.transformer_layers()[level]
                yield from _transformer(f"{block}.attentions.{j}", width, layers, config)
            inputs = width
        if level:
            yield from _weight(f"{block}.upsamplers.0.conv", width, width, 3, 3)


def _autoencoder(config: AutoencoderConfig) -> Tensors:
    down, latent = config.block_out_channels, config.latent_channels
    up, layers = down[::-1], config.layers_per_block
    yield from _weight("encoder.conv_in", down[0], config.in_channels, 3, 3)
    yield from _levels("encoder.down_blocks", "downsamplers", down, layers)
    yield from _middle("encoder.mid_block", down[-1], config)
    yield from _weight("encoder.conv_norm_out", down[-1])
    yield from _weight("encoder.conv_out", 2 * latent, down[-1], 3, 3)
    yield from _weight("decoder.conv_in", up[0], latent, 3, 3)
    yield from _middle("decoder.mid_block", up[0], config)
    yield from _levels("decoder.up_blocks", "upsamplers", up, layers + 1)
    yield from _weight("decoder.conv_norm_out", up[-1])
    yield from _weight("decoder.conv_out", config.out_channels, up[-1], 3, 3)
    if config.use_quant_conv:
        yield from _weight("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if config.use_post_quant_conv:
        yield from _weight("post_quant_conv", latent, latent, 1, 1)


def _levels(name: str, resampler: str, widths: Sequence[int], layers: int) -> Tensors:
    inputs = widths[0]
    for level, width in enumerate(widths):
        for i in range(layers):
            yield from _resnet(f"{name}.{level}.resnets.{i}", inputs, width)
            inputs = width
        if level < len(widths) - 1:
            yield from _weight(f"{name}.{level}.{resampler}.0.conv", width, width, 3, 3)


def _middle(name: str, width: int, config: AutoencoderConfig) -> Tensors:
    yield from _resnet(f"{name}.resnets.0", width, width)
    if config.mid_block_add_attention:
        yield from _weight(f"{name}.attentions.0.group_norm", width)
        yield from _attention(f"{name}.attentions.0", width, width, bias=True)
    yield from _resnet(f"{name}.resnets.1", width, width)


def _tiny_decoder(config: TinyDecoderConfig) -> Tensors:
    """Layers are numbered through all levels, and those without weights count too."""
    width, number = config.decoder_block_out_channels[0], 2  # an activation comes second
    yield from _weight("decoder.layers.0", width, config.latent_channels, 3, 3)
    for level, blocks in enumerate(config.num_decoder_blocks, 1):
        for _ in range(blocks):
            for conv in (0, 2, 4):
                yield from _weight(f"decoder.layers.{number}.conv.{conv}", width, width, 3, 3)
            number += 1
        if level < len(config.num_decoder_blocks):
            number += 1  # the enlarging
            yield from _weight(f"decoder.layers.{number}", width, width, 3, 3, bias=False)
            number += 1
    yield from _weight(f"decoder.layers.{number}", 3, width, 3, 3)


def _text_encoder(config: TextEncoderConfig) -> Tensors:
    width, hidden = config.hidden_size, config.intermediate_size
    yield "text_model.embeddings.token_embedding.weight", (config.vocab_size, width)
    positions = config.max_position_embeddings
    yield "text_model.embeddings.position_embedding.weight", (positions, width)
    for i in range(config.num_hidden_layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _weight(f"{layer}.self_attn.{name}", width, width)
        yield from _weight(f"{layer}.layer_norm1", width)
        yield from _weight(f"{layer}.mlp.fc1", hidden, width)
        yield from _weight(f"{layer}.mlp.fc2", width, hidden)
        yield from _weight(f"{layer}.layer_norm2", width)
    yield from _weight("text_model.final_layer_norm", width)
    if config.projection_dim:
        yield "text_projection.weight", (config.projection_dim, width)


def _language_model(config: GPT2Config) -> Tensors:
    """GPT-2 keeps the weights of its projections as (inputs, outputs)."""
    width = config.n_embd
    yield "transformer.wte.weight", (config.vocab_size, width)
    yield "transformer.wpe.weight", (config.n_positions, width)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        yield from _weight(f"{block}.ln_1", width)
        yield from _projection(f"{block}.attn.c_attn", width, 3 * width)
        yield from _projection(f"{block}.attn.c_proj", width, width)
        yield from _weight(f"{block}.ln_2", width)
        yield from _projection(f"{block}.mlp.c_fc", width, config.inner)
        yield from _projection(f"{block}.mlp.c_proj", config.inner, width)
    yield from _weight("transformer.ln_f", width)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)


def _projection(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)
