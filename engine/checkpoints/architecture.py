"""The architecture of a part, read off the shapes of its tensors in the original layout.

Four things no shape tells, and these rules do: heads (the caller's), 32 groups in every norm,
heads of 64 values in the text encoders, and the end-of-text token, the largest id of all.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Self, TypedDict

from engine.configs.base import Shape
from engine.configs.diffusion import LARGEST_ID, AutoencoderConfig, TextEncoderConfig, UNetConfig
from engine.configs.transformer_depths import ATTENDING_MIDDLE, transformer_fields
from engine.errors import MissingTensorError, ModelError

__all__ = [
    "CONDITIONS",
    "CONTEXT",
    "LINEAR_PROJECTION",
    "Stored",
    "autoencoder_config",
    "clip_config",
    "first_transformer",
    "open_clip_config",
    "told_numbers",
    "unet_config",
]

HEAD_DIM = 64  # values of an attention head, wherever heads are not counted
SD1_HEADS = 8  # at every level of Stable Diffusion 1
SD2_WIDTH, SD2_LAYERS = 1024, 23  # OpenCLIP ViT-H without its last layer
# What the original code and diffusers call a level of the autoencoder, a layer of it, attention.
AUTOENCODER_LAYOUTS = (
    ("encoder.down.{}", "block.{}", "encoder.mid.attn_1"),
    ("encoder.down_blocks.{}", "resnets.{}", "encoder.mid_block.attentions"),
)
# What OpenCLIP calls its tokens' table, positions, a layer and its first matrix; and what
# stable-diffusion.cpp calls them, which names every text encoder as transformers does.
OPEN_CLIP_LAYOUTS = (
    ("token_embedding.weight", "positional_embedding", "transformer.resblocks.{}", "mlp.c_fc"),
    (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.{}",
        "mlp.fc1",
    ),
)
MAX_NAME = 200  # characters; real names have some 100
# LCM's addition was never in the original code: files have it in its style or in diffusers'.
CONDITIONS = ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")
# OpenCLIP's projection of the text as diffusers' converter writes it: (out, in), as of all layers.
LINEAR_PROJECTION = "text_projection.weight"
CONTEXT = "transformer_blocks.0.attn2.to_k.weight"  # reads the text
UNET_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")
SIZES = 6  # numbers about sizes and crops that XL is told; its refiner takes 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The shapes of one part of a file: names after `prefix`.

    modules: every beginning of a name that ends before a dot, so that a module which lacks one
        tensor is still seen, and the tensor is missed
    """

    path: Path
    prefix: str
    shapes: Mapping[str, Shape]
    modules: Set[str]

    @classmethod
    def of(cls, path: Path, prefix: str, shapes: Mapping[str, Shape]) -> Self:
        """List the tensors and modules under a prefix."""
        modules = set()
        for name in shapes:
            if name.startswith(prefix) and len(name) <= MAX_NAME:
                module = name.rpartition(".")[0]
                while len(module) > len(prefix) and module not in modules:
                    modules.add(module)
                    module = module.rpartition(".")[0]
        return cls(path=path, prefix=prefix, shapes=shapes, modules=modules)

    def __contains__(self, name: str) -> bool:
        """Tell whether the part has a tensor, or a module with tensors, of this name."""
        name = self.prefix + name
        return name in self.shapes or name in self.modules

    def size(self, name: str, axis: int = 0) -> int:
        """Return one dimension of a tensor; or raise MissingTensorError or ModelError."""
        shape = self.shapes.get(self.prefix + name)
        if shape is None:
            raise MissingTensorError(
                f"{self.path} lacks {self.prefix}{name}; the file is incomplete or of an "
                "architecture that is not supported: use a Stable Diffusion 1.x, 2.x or XL model"
            )
        if axis >= len(shape) or not shape[axis]:
            raise ModelError(
                f"{self.path}: {self.prefix}{name} has shape {shape!r:.80}, of which no layer can "
                "be made; download the file or save it again"
            )
        return shape[axis]

    def count(self, module: str) -> int:
        """Count the modules of this name with 0, 1, 2 and so on in the place of `{}`."""
        return next(i for i in count() if module.format(i) not in self)


@dataclass(slots=True, kw_only=True)
class _Level:
    """One resolution of the UNet on the way down.

    depths: its transformers' blocks; blocks: the numbers of its residual blocks
    """

    width: int
    depths: list[int]
    blocks: list[int] = field(default_factory=list)


class ToldNumbers(TypedDict):
    """Fields of a UNet's configuration on the numbers that XL is told."""

    addition_time_embed_dim: int
    time_ids: int


def told_numbers(inputs: int, pooled: int, *, refiner: bool) -> ToldNumbers:
    """Read off how many numbers XL is told: 6 sizes, or 4 and a score where 5 alone divide evenly.

    inputs: of the layer that takes the pooled text, of the width `pooled`, and each number's values
    refiner: whether the only text encoder gives the context too, from which 5 follow
    """
    left = max(inputs - pooled, 0)
    scored = not refiner and left % SIZES != 0 and left % (SIZES - 1) == 0
    return {
        "addition_time_embed_dim": left // (SIZES - (refiner or scored)) if inputs else 0,
        "time_ids": SIZES - 1 if inputs and scored else 0,
    }


def unet_config(stored: Stored, *, linear: bool, pooled: int, refiner: bool) -> UNetConfig:
    """Read off a UNet's architecture.

    linear: the projections around transformers are linear layers and heads have 64 values, as in
    Stable Diffusion 2 and XL; else convolutions and 8 heads. pooled: width of XL's pooled text.
    Raises ModelError where the tensors make none.
    """
    levels = _levels(stored)
    widths = tuple(level.width for level in levels)
    layers = [len(level.depths) for level in levels]
    downs = [level.depths for level in levels]
    ups = _depths_on_the_way_up(stored, layers[::-1])
    middle = stored.count("middle_block.1.transformer_blocks.{}")
    for level, depths in enumerate((*downs, *ups)):
        if 0 in depths and any(depths):
            raise ModelError(
                f"{stored.path} has a UNet whose level {level} has transformers of {depths} "
                "blocks; supported are levels with a transformer behind each residual block, or "
                "with none: use a Stable Diffusion 1.x, 2.x or XL model"
            )
    inputs = 0
    if "label_emb" in stored:
        inputs = stored.size("label_emb.0.0.weight", 1)
    condition = next((name for name in CONDITIONS if name in stored), None)
    context = stored.size(f"{first_transformer(stored)}.{CONTEXT}", 1)
    # Those that were distilled to attention at lower levels alone have heads of one size, too.
    counted = not linear and (any(downs[0]) or not any(map(any, downs)))
    return UNetConfig(
        in_channels=stored.size("input_blocks.0.0.weight", 1),
        out_channels=stored.size("out.2.weight"),
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in downs),
        mid_block_type=_middle_type(stored, middle),
        up_block_types=tuple("CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in ups),
        layers_per_block=layers[0] if len(set(layers)) == 1 else tuple(layers),
        cross_attention_dim=context,
        attention_head_dim=SD1_HEADS if counted else tuple(_heads(width) for width in widths),
        **transformer_fields(downs, ups, middle),
        only_cross_attention=_text_alone(stored, levels, context),
        use_linear_projection=linear,
        addition_embed_type="text_time" if inputs else None,
        **told_numbers(inputs, pooled, refiner=refiner),
        projection_class_embeddings_input_dim=inputs,
        time_cond_proj_dim=stored.size(condition, 1) if condition else 0,
    )


def _levels(stored: Stored) -> list[_Level]:
    """Walk down the input blocks; `.op` is the downsampling between two levels."""
    levels = [_Level(width=stored.size("input_blocks.0.0.weight"), depths=[])]
    for number in count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0.op" in stored:
            levels.append(_Level(width=0, depths=[]))
        elif block in stored:
            levels[-1].width = stored.size(f"{block}.0.in_layers.2.weight")
            levels[-1].depths.append(stored.count(f"{block}.1.transformer_blocks.{{}}"))
            levels[-1].blocks.append(number)
        else:
            break
    return levels


def _depths_on_the_way_up(stored: Stored, layers: Sequence[int]) -> list[list[int]]:
    """Count the blocks of the transformers of each level, from the lowest; one layer more each."""
    numbers = count()
    return [
        [
            stored.count(f"output_blocks.{next(numbers)}.1.transformer_blocks.{{}}")
            for _ in range(n + 1)
        ]
        for n in layers
    ]


def _middle_type(stored: Stored, depth: int) -> str | None:
    """Tell whether the middle is whole, a residual block alone, or not there."""
    if depth:
        return ATTENDING_MIDDLE
    return "UNetMidBlock2D" if "middle_block.0" in stored else None


def first_transformer(file: Stored, prefix: str = "") -> str:
    """Return the name of the first transformer of a UNet, or that of the middle's if it has none.

    prefix: of the UNet in a file that is read whole
    """
    last = f".{CONTEXT}"
    within = file.prefix + prefix
    ours = (name.removeprefix(within) for name in file.shapes if name.endswith(last))
    found = next((name for name in ours if name.startswith(UNET_BLOCKS)), None)
    return prefix + (found.removesuffix(last) if found else "middle_block.1")


def _text_alone(stored: Stored, levels: list[_Level], context: int) -> bool | tuple[bool, ...]:
    """Tell the levels whose first attention is to the text, by its width; False if none is."""
    alone = []
    for level in levels:
        first = f"input_blocks.{level.blocks[0]}.1.transformer_blocks.0.attn1.to_k.weight"
        width = stored.size(first, 1) if any(level.depths) else level.width
        alone.append(width == context != level.width)
    return tuple(alone) if any(alone) else False


def autoencoder_config(stored: Stored, *, scaling_factor: float) -> AutoencoderConfig:
    """Read off an autoencoder's architecture, in the original layout or in diffusers'.

    Its scaling factor is no tensor's shape.
    """
    level, layer, attention = AUTOENCODER_LAYOUTS["encoder.mid_block" in stored]
    first = f"{level}.{layer.format(0)}.conv1.weight"
    widths = [stored.size(first.format(i)) for i in range(max(stored.count(level), 1))]
    return AutoencoderConfig(
        in_channels=stored.size("encoder.conv_in.weight", 1),
        out_channels=stored.size("decoder.conv_out.weight"),
        latent_channels=stored.size("decoder.conv_in.weight", 1),
        block_out_channels=tuple(widths),
        layers_per_block=stored.count(f"{level.format(0)}.{layer}"),
        mid_block_add_attention=attention in stored,
        use_quant_conv="quant_conv" in stored,
        use_post_quant_conv="post_quant_conv" in stored,
        scaling_factor=scaling_factor,
    )


def clip_config(stored: Stored) -> TextEncoderConfig:
    """Read off the architecture of a CLIP text encoder as transformers names its tensors."""
    width = stored.size("embeddings.token_embedding.weight", 1)
    return TextEncoderConfig(
        vocab_size=stored.size("embeddings.token_embedding.weight"),
        hidden_size=width,
        intermediate_size=stored.size("encoder.layers.0.mlp.fc1.weight"),
        num_hidden_layers=stored.count("encoder.layers.{}"),
        num_attention_heads=_heads(width),
        max_position_embeddings=stored.size("embeddings.position_embedding.weight"),
        hidden_act="quick_gelu",
        eos_token_id=LARGEST_ID,
    )


def open_clip_config(stored: Stored, *, pooled: bool) -> TextEncoderConfig:
    """Read off the architecture of an OpenCLIP text tower.

    pooled: the model is told the projected text, as XL is, and so needs every layer. Stable
    Diffusion 2 attends to the layer before the last one, and the last is not used; some files
    have lost it, and these have lost the projection too.
    """
    tokens, positions, layer, fc1 = OPEN_CLIP_LAYOUTS["encoder.layers" in stored]
    width, layers = stored.size(tokens, 1), stored.count(layer)
    if not pooled:
        whole = width != SD2_WIDTH and "text_projection" in stored
        layers = SD2_LAYERS if width == SD2_WIDTH else layers - whole
    return TextEncoderConfig(
        vocab_size=stored.size(tokens),
        hidden_size=width,
        intermediate_size=stored.size(f"{layer.format(0)}.{fc1}.weight"),
        num_hidden_layers=layers,
        num_attention_heads=_heads(width),
        max_position_embeddings=stored.size(positions),
        hidden_act="gelu",
        eos_token_id=LARGEST_ID,
        projection_dim=_projection(stored) if pooled else 0,
    )


def _projection(stored: Stored) -> int:
    """Return the width of the projected text; transformers' name stands outside the model's."""
    outside = stored.prefix.removesuffix("text_model.") + LINEAR_PROJECTION
    if outside in stored.shapes:
        return stored.shapes[outside][0]
    return stored.size("text_projection", 1)


def _heads(width: int) -> int:
    return max(width // HEAD_DIM, 1)
