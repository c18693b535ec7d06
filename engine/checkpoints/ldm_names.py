"""The layout of the original training code: what it calls the tensors that our graphs name.

One table a part, rows of (ours, theirs); a row names a module, and what is under it keeps its
name. The numbers of blocks are worked out once for each part. Sources: `openaimodel.py`,
`model.py` and `modules.py` of CompVis' stable-diffusion, Stability AI's stablediffusion and
generative-models (names of 2022 and 2023), and OpenCLIP's `transformer.py`.
"""

from collections.abc import Container, Iterable, Mapping, Sequence

from engine.checkpoints.component import Source
from engine.configs.control_net import ControlNetConfig
from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig

__all__ = [
    "autoencoder_sources",
    "control_net_sources",
    "open_clip_sources",
    "renamed_open_clip_sources",
    "text_encoder_sources",
    "unet_sources",
]

# ours -> theirs, within a residual block of the UNet (openaimodel.ResBlock)
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
# the UNet outside its levels (openaimodel.UNetModel); `cond_proj` is LCM's addition
UNET = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.cond_proj", "time_embed.cond_proj"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
# the autoencoder outside its levels (model.Encoder, model.Decoder, autoencoder.AutoencoderKL)
AUTOENCODER = (
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)
CODER = (  # within `encoder` and within `decoder`
    ("conv_in", "conv_in"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("conv_norm_out", "norm_out"),
    ("conv_out", "conv_out"),
)
# within a block of the autoencoder; its attention was four convolutions of one pixel
CODER_BLOCK = (
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
# OpenCLIP's text tower (transformer.TextTransformer) and, below, one layer of it
OPEN_CLIP = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
)
OPEN_CLIP_LAYER = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("layer_norm2", "ln_2"),
)
FUSED = ("q_proj", "k_proj", "v_proj")  # the thirds of OpenCLIP's in_proj_weight and in_proj_bias
# What the three are called where transformers' names were given to an OpenCLIP model.
FUSED_NAMES = ("attn.in_proj_{}", "self_attn.in_proj.{}")


Sources = dict[str, Source]


def unet_sources(config: UNetConfig) -> Sources:
    """Say where each tensor of a UNet is, under `model.diffusion_model.` in a whole model.

    Input and output blocks are numbered through all levels. `input_blocks.0` is the first
    convolution; each residual block with its transformer is one block, each downsampling another.
    An upsampling belongs to the last output block of its level, after the transformer if any.
    """
    return _rename(config.tensor_shapes(), _unet_modules(config))


def control_net_sources(config: ControlNetConfig) -> Sources:
    """Say where each tensor of a ControlNet is, under `control_model.` in a whole model.

    What it shares with a UNet is named likewise. The hint's convolutions are numbered with the
    activations between them (cldm.ControlNet).
    """
    modules = _unet_modules(config)
    hint, last = "controlnet_cond_embedding", len(config.conditioning_embedding_out_channels) - 1
    names = ["conv_in", *(f"blocks.{i}" for i in range(2 * last)), "conv_out"]
    modules |= {f"{hint}.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(names)}
    count = sum(map(len, config.residual_widths())) - 1
    modules |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(count)}
    modules["controlnet_mid_block"] = "middle_block_out.0"
    return _rename(config.tensor_shapes(), modules)


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    modules = dict(UNET)
    number = 1
    for level, layers in enumerate(config.layers()):
        for i in range(layers):
            _add_unet_block(modules, f"down_blocks.{level}", i, f"input_blocks.{number}")
            number += 1
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    for i, theirs in enumerate(("middle_block.0", "middle_block.2")):
        _add_resnet(modules, f"mid_block.resnets.{i}", theirs)
    modules["mid_block.attentions.0"] = "middle_block.1"
    number = 0
    for level, layers in enumerate(reversed(config.layers())):
        for i in range(layers + 1):
            _add_unet_block(modules, f"up_blocks.{level}", i, f"output_blocks.{number}")
            number += 1
        place = 2 if "CrossAttn" in config.up_block_types[level] else 1
        upsampler = f"output_blocks.{number - 1}.{place}.conv"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = upsampler
    return modules


def autoencoder_sources(config: AutoencoderConfig) -> Sources:
    """Say where each tensor of an autoencoder is, under `first_stage_model.` in a whole model.

    The decoder's levels are numbered from the other end: 0 is the widest picture.
    """
    modules = dict(AUTOENCODER)
    for coder in ("encoder", "decoder"):
        modules |= {f"{coder}.{ours}": f"{coder}.{theirs}" for ours, theirs in CODER}
    levels = len(config.block_out_channels)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for i in range(config.layers_per_block + 1):
            modules[f"encoder.down_blocks.{level}.resnets.{i}"] = f"{down}.block.{i}"
            modules[f"decoder.up_blocks.{level}.resnets.{i}"] = f"{up}.block.{i}"
        modules[f"encoder.down_blocks.{level}.downsamplers.0"] = f"{down}.downsample"
        modules[f"decoder.up_blocks.{level}.upsamplers.0"] = f"{up}.upsample"
    return _rename(config.tensor_shapes(), modules, CODER_BLOCK)


def text_encoder_sources(config: TextEncoderConfig, prefix: str) -> Sources:
    """Say where each tensor of a CLIP text encoder is; `prefix` stands for `text_model.`."""
    return _rename(config.tensor_shapes(), {"text_model": prefix.rstrip(".")})


def open_clip_sources(config: TextEncoderConfig, *, linear: bool = False) -> Sources:
    """Say where each tensor of a text encoder is in an OpenCLIP model.

    Queries, keys and values are the thirds of one matrix, and the projection is stored so that
    the text is multiplied from the left; linear: it is a linear layer, as diffusers' converter
    writes it.
    """
    modules = dict(OPEN_CLIP)
    sources: Sources = {}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= {f"{ours}.{row[0]}": f"{theirs}.{row[1]}" for row in OPEN_CLIP_LAYER}
        for third, name in enumerate(FUSED):
            for kind in ("weight", "bias"):
                source = Source(name=f"{theirs}.attn.in_proj_{kind}", third=third)
                sources[f"{ours}.self_attn.{name}.{kind}"] = source
    names = config.tensor_shapes()
    sources = _rename([name for name in names if name not in sources], modules) | sources
    if config.projection_dim:
        name = "text_projection.weight" if linear else "text_projection"
        sources["text_projection.weight"] = Source(name=name, transposed=not linear)
    return {name: sources[name] for name in names}


def renamed_open_clip_sources(
    config: TextEncoderConfig, prefix: str, names: Container[str]
) -> Sources:
    """Say where each tensor of an OpenCLIP model is that stable-diffusion.cpp wrote.

    prefix: stands for `text_model.`, as in `text_encoder_sources`; names: of all tensors there are.
    The three projections are one matrix where they came so, and the projection of the text lies as
    it came: OpenCLIP's under the prefix, transformers' beside it.
    """
    sources = text_encoder_sources(config, prefix)
    for i in range(config.num_hidden_layers):
        for fused in FUSED_NAMES:
            layer = f"encoder.layers.{i}.{fused}"
            if prefix + layer.format("weight") in names:
                for third, name in enumerate(FUSED):
                    for kind in ("weight", "bias"):
                        ours = f"text_model.encoder.layers.{i}.self_attn.{name}.{kind}"
                        sources[ours] = Source(name=prefix + layer.format(kind), third=third)
    if config.projection_dim:
        own, outside = "text_projection", "text_projection.weight"
        beside = prefix.removesuffix("text_model.") + outside
        inside = Source(name=prefix + own, transposed=True)
        sources[outside] = Source(name=beside) if beside in names else inside
    return sources


def _add_resnet(modules: dict[str, str], ours: str, theirs: str) -> None:
    modules |= {f"{ours}.{row[0]}": f"{theirs}.{row[1]}" for row in RESNET}


def _add_unet_block(modules: dict[str, str], level: str, i: int, block: str) -> None:
    """A residual block of a level is `.0` of its input or output block, the transformer `.1`."""
    _add_resnet(modules, f"{level}.resnets.{i}", f"{block}.0")
    modules[f"{level}.attentions.{i}"] = f"{block}.1"


def _rename(
    names: Iterable[str],
    modules: Mapping[str, str],
    inner: Sequence[tuple[str, str]] = (),
) -> Sources:
    """Replace the module that a name begins with, and then what the rest of it is called within.

    What the original code never had keeps its name.
    """
    sources = {}
    for name in names:
        head, rest = name, ""
        while head and head not in modules:
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        for ours, theirs in inner:
            rest = f"{rest}.".replace(f".{ours}.", f".{theirs}.").removesuffix(".")
        sources[name] = Source(name=(modules.get(head, "") + rest).removeprefix("."))
    return sources
