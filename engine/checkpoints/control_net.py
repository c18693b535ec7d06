"""A ControlNet's file or folder, beside the UNet that it is to steer.

Files have the names of the original training code, after `control_model.` or alone, or diffusers',
and so have those of a control-LoRA (`control_lora.py`) and of a union of ControlNets, whose own
tensors have one name in both.
What no shape tells (heads, groups of norms) is as in the UNet.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoints.architecture import SIZES, Stored
from engine.checkpoints.component import Component, Source, assemble, refuse_left_over, shown
from engine.checkpoints.control_lora import ControlLora, is_control_lora, make_control_lora
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.ldm_names import control_net_sources
from engine.configs.base import read_json
from engine.configs.control_net import ControlNetConfig, control_net_of, mirrored
from engine.configs.control_net_union import ControlNetUnionConfig
from engine.configs.transformer_depths import ATTENDING_MIDDLE
from engine.configs.unet import UNetConfig
from engine.errors import ModelError

__all__ = ["is_control_net", "is_pooled", "open_control_net"]

POOLED = 1280  # width of XL's pooled text
ADVICE = "give the file or folder of a ControlNet"
POOLED_NAME = r"(^|[-_. ])shuffle($|[-_. ])"  # in the name of a file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What a layout calls the modules by which an architecture is told; {} are numbers.

    prefixes: what may stand before the names
    hint, hints: the first convolution of the hint's encoder, and the others
    middle: the middle's transformer; original: whether it is that of the original training code
    """

    prefixes: tuple[str, ...]
    hint: str
    hints: str
    middle: str
    original: bool


LAYOUTS = (
    _Layout(
        prefixes=("control_model.", "controlnet.", ""),
        hint="input_hint_block.0.weight",
        hints="input_hint_block.{}",
        middle="middle_block.1",
        original=True,
    ),
    _Layout(
        prefixes=("controlnet.", "control_model.", ""),
        hint="controlnet_cond_embedding.conv_in.weight",
        hints="controlnet_cond_embedding.blocks.{}",
        middle="mid_block.attentions.0",
        original=False,
    ),
)
# What a file of training holds beside the ControlNet: the model that it was trained for.
MODEL = r"(model\.diffusion_model|cond_stage_model|first_stage_model|model_ema)\..+"
# What a union has and no other ControlNet.
TASKS, TYPES = "task_embedding", "control_add_embedding.linear_1.weight"
# pattern found in a name: what the file is, of those that have a ControlNet's names and more
KINDS: Mapping[str, str] = MappingProxyType(
    {r"(^|\.)difference$": "the difference of a ControlNet from a model"}
)
# and of others that are given in a ControlNet's place
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        r"^lllite_": "a ControlNet-LLLite",
        r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b": "a T2I-Adapter",
        r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
        r"^(transformer_blocks|joint_blocks|double_blocks|controlnet_x_embedder)\.": "a ControlNet "
        "of a diffusion transformer, such as Flux",
        r"^(model\.diffusion_model|unet|up_blocks|output_blocks)\.": "a model or a UNet",
        r"lora_(unet|te\d?)_|\.lora_(up|down|[AB])\b": "a LoRA",
    }
)


def is_control_net(names: Container[str]) -> bool:
    """Tell whether tensors of these names are a ControlNet's."""
    return _layout(names) is not None


def open_control_net(
    path: Path, unet: UNetConfig, base: Component | None = None
) -> tuple[ControlNetConfig, Component | ControlLora]:
    """Open a ControlNet for a UNet; no weights are read.

    base: the UNet's tensors, from which a control-LoRA is a difference
    Raises ModelError when it is none, is one for another family, or holds a tensor without a place.
    """
    weights = open_weights(path)
    found = _layout(weights)
    for pattern, what in (KINDS if found else {**KINDS, **OTHERS}).items():
        if any(re.search(pattern, name[:200]) for name in weights):
            raise ModelError(f"{path} is {what}, which cannot be used as one; {ADVICE}")
    if found is None:
        listed = ", ".join(shown(name, 60) for name in list(weights)[:3]) or "nothing"
        raise ModelError(f"{path} holds no ControlNet but {listed}; {ADVICE}")
    layout, prefix = found
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    stored = Stored.of(path, prefix, shapes)
    if is_control_lora(weights):
        if base is None:
            raise ModelError(f"{path} is a control-LoRA, which is read with its model's UNet alone")
        config = replace(control_net_of(unet), **_hint(stored, layout))
        _check_family(path, config, unet)
        sources = _sources(config, layout, prefix)
        return config, make_control_lora(path, weights, config, sources, base)
    union = any(prefix + name in weights for name in (TASKS, TYPES))
    kind = ControlNetUnionConfig if union else ControlNetConfig
    config = _stated(path, kind) or _config(stored, layout, unet, kind)
    if union:  # whose folders do not all say how many
        config = replace(config, **_types(stored))
    _check_family(path, config, unet)
    component = assemble(path, weights, config, _sources(config, layout, prefix))
    refuse_left_over(path, weights, component.used(), MODEL)
    return config, component


def is_pooled(path: Path) -> bool:
    """Tell whether a ControlNet's residuals count in the mean over all places of a map.

    A folder's configuration says so. Of files no tensor tells, and lllyasviel's "shuffle", which is
    the one that was published, goes by its name, as in other programs.
    """
    if path.is_dir():
        file = path / "config.json"
        return file.is_file() and read_json(file).get("global_pool_conditions") is True
    return re.search(POOLED_NAME, path.stem, re.IGNORECASE) is not None


def _layout(names: Container[str]) -> tuple[_Layout, str] | None:
    held = ((layout, p) for layout in LAYOUTS for p in layout.prefixes if p + layout.hint in names)
    return next(held, None)


def _sources(config: ControlNetConfig, layout: _Layout, prefix: str) -> dict[str, Source]:
    sources = {name: Source(name=name) for name in config.tensor_shapes()}
    if layout.original:
        sources = dict(control_net_sources(config))
    return {name: replace(s, name=prefix + s.name) for name, s in sources.items()}


def _stated(path: Path, kind: type[ControlNetConfig]) -> ControlNetConfig | None:
    """Read the configuration in a folder; None for a file, whose shapes tell."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    return kind.from_dict(_with_depths(read_json(file)))


def _with_depths(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put 1 for the depth of levels without transformers, as of a file; some folders say 0."""
    downs, depths = values.get("down_block_types"), values.get("transformer_layers_per_block")
    if not isinstance(downs, list) or not isinstance(depths, list) or len(downs) != len(depths):
        return values
    middle = values.get("mid_block_type", ATTENDING_MIDDLE) == ATTENDING_MIDDLE
    attends = ["CrossAttn" in str(block) for block in downs[:-1]]
    attends += ["CrossAttn" in str(block) or middle for block in downs[-1:]]
    told = [depth if here else 1 for depth, here in zip(depths, attends, strict=True)]
    return {**values, "transformer_layers_per_block": told}


def _types(stored: Stored) -> dict[str, Any]:
    """Return what tensors of a union say of its types; raises MissingTensorError."""
    return {
        "num_control_type": stored.size(TASKS),
        "num_trans_layer": max(stored.count("transformer_layes.{}"), 1),
    }


def _config(
    stored: Stored, layout: _Layout, unet: UNetConfig, kind: type[ControlNetConfig]
) -> ControlNetConfig:
    """Read off an architecture; raises ModelError naming a tensor that is missing."""
    widths, depths = (_original_levels if layout.original else _levels)(stored)
    middle = stored.count(layout.middle + ".transformer_blocks.{}")
    context = f"{layout.middle}.transformer_blocks.0.attn2.to_k.weight"
    label = "label_emb.0.0.weight" if layout.original else "add_embedding.linear_1.weight"
    first = "input_blocks.0.0.weight" if layout.original else "conv_in.weight"
    projection = stored.shapes.get(f"{stored.prefix}{layout.middle}.proj_in.weight", ())
    told = label.rpartition(".")[0] in stored
    inputs = stored.size(label, 1) if told else 0
    downs = tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in depths)
    layers = tuple(map(len, depths))
    own = control_net_of(unet, kind)
    found = replace(
        own,
        in_channels=stored.size(first, 1),
        block_out_channels=widths,
        down_block_types=downs,
        up_block_types=mirrored(downs),
        mid_block_type=ATTENDING_MIDDLE if middle else "UNetMidBlock2D",
        layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        cross_attention_dim=stored.size(context, 1) if middle else own.cross_attention_dim,
        use_linear_projection=len(projection) == 2 if middle else own.use_linear_projection,
        attention_head_dim=_by_level(own.attention_head_dim, len(widths)),
        num_attention_heads=_by_level(own.num_attention_heads, len(widths)),
        only_cross_attention=_by_level(own.only_cross_attention, len(widths)),
        transformer_layers_per_block=_depths(depths, middle),
        addition_embed_type="text_time" if told else None,
        addition_time_embed_dim=(
            own.addition_time_embed_dim or max((inputs - POOLED) // SIZES, 1) if told else 0
        ),
        projection_class_embeddings_input_dim=inputs,
        **_hint(stored, layout),
    )
    same = found.down_depths(), found.middle_depth()
    if widths == own.block_out_channels and same == (own.down_depths(), own.middle_depth()):
        depth = own.transformer_layers_per_block  # written as the UNet's, whose graphs there are
        found = replace(found, transformer_layers_per_block=depth)
    return found


def _by_level(value: Any, levels: int) -> Any:
    """Take a fact of the UNet's levels for as many as there are; the last stands for more."""
    return (*value, *value[-1:] * levels)[:levels] if isinstance(value, tuple) else value


def _depths(depths: Sequence[Sequence[int]], middle: int) -> tuple[int, ...]:
    levels = [next(iter(level), 0) for level in depths]
    levels[-1] = levels[-1] or middle
    return tuple(depth or 1 for depth in levels)


def _levels(stored: Stored) -> tuple[tuple[int, ...], list[list[int]]]:
    """Return every level's width, and the blocks of its transformers by layer."""
    widths, depths = list[int](), list[list[int]]()
    for level in range(stored.count("down_blocks.{}")):
        block = f"down_blocks.{level}"
        widths.append(stored.size(f"{block}.resnets.0.conv1.weight"))
        depths.append(
            [
                stored.count(f"{block}.attentions.{i}.transformer_blocks.{{}}")
                for i in range(stored.count(block + ".resnets.{}"))
            ]
        )
    return tuple(widths), depths


def _original_levels(stored: Stored) -> tuple[tuple[int, ...], list[list[int]]]:
    """Do the same for the original names, which number blocks through all levels."""
    widths, depths = [0], [list[int]()]
    for number in range(1, stored.count("input_blocks.{}")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op" in stored:
            widths.append(0)
            depths.append([])
        else:
            widths[-1] = stored.size(f"{block}.0.in_layers.2.weight")
            depths[-1].append(stored.count(f"{block}.1.transformer_blocks.{{}}"))
    return tuple(widths), depths


def _hint(stored: Stored, layout: _Layout) -> dict[str, Any]:
    """Return what the hint's encoder says of a configuration."""
    return {
        "conditioning_channels": stored.size(layout.hint, 1),
        "conditioning_embedding_out_channels": _hint_widths(stored, layout),
    }


def _hint_widths(stored: Stored, layout: _Layout) -> tuple[int, ...]:
    """Return the widths of the hint's encoder: after the first convolution every second is wider.

    The original names count activations between them, and the last convolution.
    """
    step, last = (2, 1) if layout.original else (1, 0)
    names, number = list[str](), step if layout.original else 0
    while layout.hints.format(number) in stored:
        names.append(layout.hints.format(number))
        number += step
    wider = names[1 : len(names) - last : 2]
    return stored.size(layout.hint), *(stored.size(f"{name}.weight") for name in wider)


def _check_family(path: Path, config: ControlNetConfig, unet: UNetConfig) -> None:
    """Raise ModelError, with what differs, when a ControlNet is not for this UNet."""
    own = control_net_of(unet)
    facts = (
        ("attends to texts of the width", "cross_attention_dim"),
        ("takes latents of channels", "in_channels"),
        ("has levels of the widths", "block_out_channels"),
        ("is told beside the text", "addition_embed_type"),
        ("is told in numbers", "projection_class_embeddings_input_dim"),
    )
    for what, name in facts:
        theirs, ours = getattr(config, name), getattr(own, name)
        if theirs != ours:
            raise ModelError(
                f"{path} is a ControlNet of another family: it {what} {theirs}, and this model's "
                f"UNet has {ours}; give one that was trained for the model's family"
            )
    gives, takes = config.residual_widths(), own.residual_widths()
    if gives != takes:
        raise ModelError(
            f"{path} is a ControlNet of another family: it gives "
            f"residuals of the widths {gives}, and this model's UNet takes {takes}; give one that "
            "was trained for the model's family"
        )
    if config.conditioning_channels != 3:
        raise ModelError(
            f"{path} takes pictures of {config.conditioning_channels} channels; "
            "supported are those of 3"
        )
    if config.compression != 8:
        raise ModelError(
            f"{path} brings pictures to a {config.compression}th of their size; supported is an 8th"
        )
