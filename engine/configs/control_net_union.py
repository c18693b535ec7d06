"""Facts of a union of ControlNets, and what the published ones call their types of pictures."""

import re
from dataclasses import dataclass

from engine.configs.base import Shape, Tensors, weight
from engine.configs.control_net import ControlNetConfig, control_net_tensors

__all__ = ["CONTROL_TYPES", "ControlNetUnionConfig", "listed_types", "type_place"]

# What xinsir's controlnet-union-sdxl-1.0 was trained to see, in the order of its tensors' rows; the
# last two are those of its "promax" alone. Names in a row are of one type.
CONTROL_TYPES = (
    ("openpose",),
    ("depth",),
    ("hed", "pidi", "scribble", "ted"),
    ("canny", "lineart", "anime_lineart", "mlsd"),
    ("normal",),
    ("segment",),
    ("tile",),
    ("repaint",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetUnionConfig(ControlNetConfig):
    """One ControlNet for pictures of several types (xinsir 2024), diffusers'
    ControlNetUnionModel.

    num_control_type: types of pictures; num_trans_layer: blocks of the transformer over what the
        hint is in the mean, as wide as the first level. Its heads change nothing (see
        `export.modules.control_net_union`).
    """

    num_control_type: int = 6
    num_trans_layer: int = 1

    @property
    def control_types(self) -> int:
        """Types of pictures that it tells apart."""
        return self.num_control_type

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in diffusers' ControlNetUnionModel."""
        return dict(control_net_tensors(self)) | dict(_tensors(self))

    def symbols(self) -> dict[str, int]:
        """Return a ControlNet's widths, how many types there are, and the embedded time's width."""
        return {
            **super(ControlNetUnionConfig, self).symbols(),
            "K": self.num_control_type,
            "Y": 4 * self.block_out_channels[0],
        }


def type_place(name: str) -> int | None:
    """Return the row that a type has in a union's tensors, by a name of it or as a number.

    None for what is neither.
    """
    if re.fullmatch("[0-9]{1,3}", name):
        return int(name)
    return next((row for row, names in enumerate(CONTROL_TYPES) if name in names), None)


def listed_types(count: int = len(CONTROL_TYPES)) -> str:
    """List the names of a union's first types; names of one type are joined by strokes."""
    return ", ".join("/".join(names) for names in CONTROL_TYPES[:count])


def _tensors(config: ControlNetUnionConfig) -> Tensors:
    width = config.block_out_channels[0]
    yield "task_embedding", (config.num_control_type, width)
    for layer in range(config.num_trans_layer):
        name = f"transformer_layes.{layer}"  # as it is spelled in the published files
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from weight(f"{name}.attn.out_proj", width, width)
        yield from weight(f"{name}.ln_1", width)
        yield from weight(f"{name}.mlp.c_fc", 4 * width, width)
        yield from weight(f"{name}.mlp.c_proj", width, 4 * width)
        yield from weight(f"{name}.ln_2", width)
    yield from weight("spatial_ch_projs", width, width)
    told = config.num_control_type * config.addition_time_embed_dim
    yield from weight("control_add_embedding.linear_1", 4 * width, told)
    yield from weight("control_add_embedding.linear_2", 4 * width, 4 * width)
