"""Files in the layout of the original training code, of any size, named as that code names them.

Written from that code's side: its configuration's terms (`channel_mult`, `transformer_depth`), its
constructors' order, its lists of blocks. The test of this module compares it at the published
sizes with names listed by the original classes themselves (`tests/support/data/README.md`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """What the training code's YAML says of a UNet."""

    model_channels: int
    channel_mult: tuple[int, ...]
    transformer_depth: tuple[int, ...]  # by level; 0 where there is no attention
    middle_depth: int | None  # 0: a residual block alone; None: no middle at all
    context_dim: int
    in_channels: int = 4
    out_channels: int = 4
    num_res_blocks: tuple[int, ...] = (2, 2, 2, 2)
    use_linear_in_transformer: bool = True
    adm_in_channels: int | None = None
    time_cond: int | None = None
    output_depth: tuple[tuple[int, ...], ...] | None = None  # as they are run, where they differ
    text_alone: tuple[bool, ...] | None = None  # levels whose first attention reads the text


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """What it says of the first stage."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4


@dataclass(frozen=True, kw_only=True)
class TextParams:
    """A CLIP or OpenCLIP text tower."""

    width: int
    layers: int
    vocab: int = 49408
    positions: int = 77
    projection: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """A whole model; which encoders there are, and where, makes the family."""

    unet: UNetParams
    vae: AutoencoderParams
    clip: TextParams | None = None
    open_clip: TextParams | None = None


FULL: Mapping[str, ModelParams] = {
    "sd1": ModelParams(
        unet=UNetParams(
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            transformer_depth=(1, 1, 1, 0),
            middle_depth=1,
            context_dim=768,
            use_linear_in_transformer=False,
        ),
        vae=AutoencoderParams(),
        clip=TextParams(width=768, layers=12),
    ),
    "sd2": ModelParams(
        unet=UNetParams(
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            transformer_depth=(1, 1, 1, 0),
            middle_depth=1,
            context_dim=1024,
        ),
        vae=AutoencoderParams(),
        open_clip=TextParams(width=1024, layers=24, projection=1024),
    ),
    "xl": ModelParams(
        unet=UNetParams(
            model_channels=320,
            channel_mult=(1, 2, 4),
            transformer_depth=(0, 2, 10),
            middle_depth=10,
            context_dim=2048,
            num_res_blocks=(2, 2, 2),
            adm_in_channels=2816,
        ),
        vae=AutoencoderParams(),
        clip=TextParams(width=768, layers=12),
        open_clip=TextParams(width=1280, layers=32, projection=1280),
    ),
    "xl-refiner": ModelParams(
        unet=UNetParams(
            model_channels=384,
            channel_mult=(1, 2, 4, 4),
            transformer_depth=(0, 4, 4, 0),
            middle_depth=4,
            context_dim=1280,
            adm_in_channels=2560,
        ),
        vae=AutoencoderParams(),
        open_clip=TextParams(width=1280, layers=32, projection=1280),
    ),
}

# Models that were distilled to fewer blocks: BK-SDM, SDXS-512 of both generations, Segmind's XL.
_BK_SDM = replace(FULL["sd1"].unet, num_res_blocks=(1, 1, 1, 1))
_BK_SDM_TINY = replace(
    _BK_SDM,
    channel_mult=(1, 2, 4),
    transformer_depth=(1, 1, 1),
    num_res_blocks=(1, 1, 1),
    middle_depth=None,
)
DISTILLED: Mapping[str, ModelParams] = {
    "bk-sdm-base": replace(FULL["sd1"], unet=_BK_SDM),
    "bk-sdm-small": replace(FULL["sd1"], unet=replace(_BK_SDM, middle_depth=None)),
    "bk-sdm-tiny": replace(FULL["sd1"], unet=_BK_SDM_TINY),
    "sdxs-512-dreamshaper": replace(
        FULL["sd1"], unet=replace(_BK_SDM_TINY, transformer_depth=(0, 1, 1))
    ),
    "sdxs-512-0.9": replace(
        FULL["sd2"],
        unet=replace(
            _BK_SDM_TINY,
            context_dim=1024,
            use_linear_in_transformer=True,
            text_alone=(True, False, False),
        ),
    ),
    "ssd-1b": replace(
        FULL["xl"],
        unet=replace(
            FULL["xl"].unet,
            transformer_depth=(0, 2, 4),
            middle_depth=0,
            output_depth=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
        ),
    ),
    "vega": replace(
        FULL["xl"],
        unet=replace(FULL["xl"].unet, transformer_depth=(0, 1, 2), middle_depth=0),
    ),
}

_SMALL_VAE = AutoencoderParams(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1)
_SMALL_CLIP = TextParams(width=64, layers=2, vocab=99, positions=16)
_SMALL_OPEN_CLIP = TextParams(width=128, layers=3, vocab=99, positions=16, projection=32)
SMALL: Mapping[str, ModelParams] = {
    "sd1": ModelParams(
        unet=UNetParams(
            model_channels=32,
            channel_mult=(1, 2),
            transformer_depth=(1, 0),
            middle_depth=1,
            context_dim=64,
            num_res_blocks=(2, 2),
            use_linear_in_transformer=False,
        ),
        vae=_SMALL_VAE,
        clip=_SMALL_CLIP,
    ),
    "sd2": ModelParams(
        unet=UNetParams(
            model_channels=32,
            channel_mult=(1, 2, 2),
            transformer_depth=(1, 1, 0),
            middle_depth=1,
            context_dim=128,
            num_res_blocks=(1, 1, 1),
        ),
        vae=_SMALL_VAE,
        open_clip=_SMALL_OPEN_CLIP,
    ),
    "xl": ModelParams(
        unet=UNetParams(
            model_channels=32,
            channel_mult=(1, 2, 4),
            transformer_depth=(0, 1, 2),
            middle_depth=2,
            context_dim=192,
            num_res_blocks=(1, 1, 1),
            adm_in_channels=32 + 6 * 16,
        ),
        vae=_SMALL_VAE,
        clip=_SMALL_CLIP,
        open_clip=_SMALL_OPEN_CLIP,
    ),
    "xl-refiner": ModelParams(
        unet=UNetParams(
            model_channels=32,
            channel_mult=(1, 2, 2),
            transformer_depth=(0, 2, 0),
            middle_depth=2,
            context_dim=128,
            num_res_blocks=(2, 2, 2),
            adm_in_channels=128 + 5 * 16,
        ),
        vae=_SMALL_VAE,
        open_clip=replace(_SMALL_OPEN_CLIP, projection=128),
    ),
}


def inpainting(params: ModelParams) -> ModelParams:
    return replace(params, unet=replace(params.unet, in_channels=9))


def editing(params: ModelParams) -> ModelParams:
    return replace(params, unet=replace(params.unet, in_channels=8))


def consistency(params: ModelParams) -> ModelParams:
    """LCM: the guidance scale is embedded, and told with the timestep."""
    return replace(params, unet=replace(params.unet, time_cond=48))


class _Names(Shapes):
    """Names and shapes, layer by layer."""

    def layer(self, name: str, *weight: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = weight
        if bias:
            self[f"{name}.bias"] = weight[:1]

    def conv(self, name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        self.layer(name, outputs, inputs, kernel, kernel)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        self.layer(name, outputs, inputs, bias=bias)

    def norm(self, name: str, channels: int) -> None:
        self.layer(name, channels)


def unet_names(params: UNetParams) -> Shapes:
    """The tensors of openaimodel.UNetModel."""
    names, width = _Names(), params.model_channels
    embedding = 4 * width
    names.linear("time_embed.0", width, embedding)
    names.linear("time_embed.2", embedding, embedding)
    if params.time_cond:
        names.linear("time_embed.cond_proj", params.time_cond, width, bias=False)
    if params.adm_in_channels:
        names.linear("label_emb.0.0", params.adm_in_channels, embedding)
        names.linear("label_emb.0.2", embedding, embedding)

    def resnet(name: str, inputs: int, outputs: int) -> int:
        names.norm(f"{name}.in_layers.0", inputs)
        names.conv(f"{name}.in_layers.2", inputs, outputs)
        names.linear(f"{name}.emb_layers.1", embedding, outputs)
        names.norm(f"{name}.out_layers.0", outputs)
        names.conv(f"{name}.out_layers.3", outputs, outputs)
        if inputs != outputs:
            names.conv(f"{name}.skip_connection", inputs, outputs, 1)
        return outputs

    def transformer(name: str, channels: int, depth: int, *, alone: bool = False) -> None:
        for end in ("proj_in", "proj_out"):
            if params.use_linear_in_transformer:
                names.linear(f"{name}.{end}", channels, channels)
            else:
                names.conv(f"{name}.{end}", channels, channels, 1)
        names.norm(f"{name}.norm", channels)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            first = params.context_dim if alone else channels
            for attention, context in (("attn1", first), ("attn2", params.context_dim)):
                names.linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
                names.linear(f"{block}.{attention}.to_k", context, channels, bias=False)
                names.linear(f"{block}.{attention}.to_v", context, channels, bias=False)
                names.linear(f"{block}.{attention}.to_out.0", channels, channels)
            names.linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
            names.linear(f"{block}.ff.net.2", 4 * channels, channels)
            for norm in ("norm1", "norm2", "norm3"):
                names.norm(f"{block}.{norm}", channels)

    names.conv("input_blocks.0.0", params.in_channels, width)
    channels, skips = width, [width]
    levels = list(zip(params.channel_mult, params.transformer_depth, strict=True))
    text_alone = params.text_alone or (False,) * len(levels)
    for level, (mult, depth) in enumerate(levels):
        for _ in range(params.num_res_blocks[level]):
            channels = resnet(f"input_blocks.{len(skips)}.0", channels, mult * width)
            if depth:
                alone = text_alone[level]
                transformer(f"input_blocks.{len(skips)}.1", channels, depth, alone=alone)
            skips.append(channels)
        if level != len(levels) - 1:
            names.conv(f"input_blocks.{len(skips)}.0.op", channels, channels)
            skips.append(channels)
    if params.middle_depth is not None:
        resnet("middle_block.0", channels, channels)
    if params.middle_depth:
        transformer("middle_block.1", channels, params.middle_depth)
        resnet("middle_block.2", channels, channels)
    block = 0
    for level, (mult, even) in reversed(list(enumerate(levels))):
        for i in range(params.num_res_blocks[level] + 1):
            depth = params.output_depth[-1 - level][i] if params.output_depth else even
            inputs = channels + skips.pop()
            channels = resnet(f"output_blocks.{block}.0", inputs, mult * width)
            if depth:
                transformer(f"output_blocks.{block}.1", channels, depth, alone=text_alone[level])
            if level and i == params.num_res_blocks[level]:
                place = 2 if depth else 1
                names.conv(f"output_blocks.{block}.{place}.conv", channels, channels)
            block += 1
    names.norm("out.0", channels)
    names.conv("out.2", width, params.out_channels)
    return names


def autoencoder_names(params: AutoencoderParams) -> Shapes:
    """The tensors of autoencoder.AutoencoderKL."""
    names, latent = _Names(), params.z_channels

    def resnet(name: str, inputs: int, outputs: int) -> int:
        names.norm(f"{name}.norm1", inputs)
        names.conv(f"{name}.conv1", inputs, outputs)
        names.norm(f"{name}.norm2", outputs)
        names.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            names.conv(f"{name}.nin_shortcut", inputs, outputs, 1)
        return outputs

    def middle(name: str, channels: int) -> None:
        resnet(f"{name}.mid.block_1", channels, channels)
        names.norm(f"{name}.mid.attn_1.norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            names.conv(f"{name}.mid.attn_1.{layer}", channels, channels, 1)
        resnet(f"{name}.mid.block_2", channels, channels)

    channels = params.ch
    names.conv("encoder.conv_in", 3, channels)
    for level, mult in enumerate(params.ch_mult):
        for i in range(params.num_res_blocks):
            channels = resnet(f"encoder.down.{level}.block.{i}", channels, params.ch * mult)
        if level != len(params.ch_mult) - 1:
            names.conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    middle("encoder", channels)
    names.norm("encoder.norm_out", channels)
    names.conv("encoder.conv_out", channels, 2 * latent)
    names.conv("decoder.conv_in", latent, channels)
    middle("decoder", channels)
    for level, mult in reversed(list(enumerate(params.ch_mult))):
        for i in range(params.num_res_blocks + 1):
            channels = resnet(f"decoder.up.{level}.block.{i}", channels, params.ch * mult)
        if level:
            names.conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    names.norm("decoder.norm_out", channels)
    names.conv("decoder.conv_out", channels, 3)
    names.conv("quant_conv", 2 * latent, 2 * latent, 1)
    names.conv("post_quant_conv", latent, latent, 1)
    return names


def clip_names(params: TextParams) -> Shapes:
    """The tensors of transformers' CLIPTextModel."""
    names, width = _Names(), params.width
    names["embeddings.token_embedding.weight"] = (params.vocab, width)
    names["embeddings.position_embedding.weight"] = (params.positions, width)
    for i in range(params.layers):
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names.linear(f"encoder.layers.{i}.self_attn.{layer}", width, width)
        names.norm(f"encoder.layers.{i}.layer_norm1", width)
        names.linear(f"encoder.layers.{i}.mlp.fc1", width, 4 * width)
        names.linear(f"encoder.layers.{i}.mlp.fc2", 4 * width, width)
        names.norm(f"encoder.layers.{i}.layer_norm2", width)
    names.norm("final_layer_norm", width)
    return names


def open_clip_names(params: TextParams) -> Shapes:
    """The tensors of OpenCLIP's CLIP without its half for pictures."""
    names, width = _Names(), params.width
    names["token_embedding.weight"] = (params.vocab, width)
    names["positional_embedding"] = (params.positions, width)
    for i in range(params.layers):
        block = f"transformer.resblocks.{i}"
        names[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        names[f"{block}.attn.in_proj_bias"] = (3 * width,)
        names.linear(f"{block}.attn.out_proj", width, width)
        names.norm(f"{block}.ln_1", width)
        names.norm(f"{block}.ln_2", width)
        names.linear(f"{block}.mlp.c_fc", width, 4 * width)
        names.linear(f"{block}.mlp.c_proj", 4 * width, width)
    names.norm("ln_final", width)
    if params.projection:
        names["text_projection"] = (width, params.projection)
    names["logit_scale"] = ()
    return names


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."
SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


def parts(params: ModelParams) -> dict[str, Shapes]:
    """The tensors of each part of a model, by the prefix under which a file has them."""
    found = {UNET: unet_names(params.unet), VAE: autoencoder_names(params.vae)}
    xl = params.unet.adm_in_channels is not None
    if params.clip:
        found[XL_CLIP if xl else CLIP] = clip_names(params.clip)
    if params.open_clip:
        place = OPEN_CLIP
        if xl:
            place = XL_OPEN_CLIP if params.clip else REFINER_OPEN_CLIP
        found[place] = open_clip_names(params.open_clip)
    return found


def model_names(params: ModelParams, *, ema: bool = False) -> Shapes:
    """Every tensor of a whole model's file, with the buffers that the training code stores."""
    names: Shapes = {}
    if params.unet.adm_in_channels is None:
        names |= dict.fromkeys(SCHEDULE, (1000,))
    else:
        names["denoiser.sigmas"] = (1000,)
    for prefix, part in parts(params).items():
        names |= {prefix + name: shape for name, shape in part.items()}
    if ema:
        names |= {"model_ema.decay": (), "model_ema.num_updates": ()}
        for name in unet_names(params.unet):
            flat = f"diffusion_model.{name}".replace(".", "")
            names[f"model_ema.{flat}"] = names[UNET + name]
    return names


def random_tensors(names: Shapes, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Numbers of which no two tensors have the same."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, np.float32).reshape(shape)
        for name, shape in names.items()
    }


def write_sparse(
    path: Path,
    names: Shapes,
    *,
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file whose data are a hole: any size, no memory, next to no disk."""
    size, end = {"F16": 2, "F32": 4, "I8": 1}[dtype], 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, shape in names.items():
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
