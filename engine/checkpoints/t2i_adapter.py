"""A T2I-Adapter's file or folder: TencentARC's names, or diffusers' (`adapter.body.0.resnets.0`).

TencentARC number the residual blocks of a full adapter through all features, and call those of a
light one `body` again.
"""

import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from engine.checkpoints.architecture import Stored
from engine.checkpoints.component import Component, Source, assemble, refuse_left_over
from engine.checkpoints.formats.files import open_weights
from engine.configs.t2i_adapter import COMPRESSION, LARGER, T2IAdapterConfig, adapted_places
from engine.configs.unet import UNetConfig
from engine.errors import ModelError

__all__ = ["is_t2i_adapter", "open_t2i_adapter"]

PREFIXES = ("adapter.", "")
FULL, LIGHT = "conv_in.weight", "body.0.in_conv.weight"
BLOCKS = 2  # in a row of a full adapter of TencentARC's
# What goes into the first layer: the picture's channels, and the side of its squares.
INPUTS = {
    channels * side**2: (channels, side) for channels in (1, 3) for side in (COMPRESSION, LARGER)
}


class _Names(NamedTuple):
    """How a file names its tensors; original: as TencentARC do."""

    prefix: str
    light: bool
    original: bool

    def stored(self, name: str) -> str:
        """Return what the file calls one of diffusers' names."""
        name = name.removeprefix("adapter.")
        if self.original and self.light:
            name = name.replace(".resnets.", ".body.")
        elif self.original and name.startswith("body."):
            _, feature, layer, *rest = name.split(".")
            number = BLOCKS * int(feature)
            if layer == "resnets":
                number += int(rest.pop(0))
                layer = rest.pop(0)
            elif layer == "downsample":
                layer = "down_opt.op"
            name = ".".join(("body", str(number), layer, *rest))
        return self.prefix + name


def is_t2i_adapter(names: Container[str]) -> bool:
    """Tell whether tensors of these names are a T2I-Adapter's."""
    return _names(names) is not None


def open_t2i_adapter(path: Path, unet: UNetConfig) -> tuple[T2IAdapterConfig, Component]:
    """Open a T2I-Adapter for a UNet; no weights are read.

    Raises ModelError when it is none, is one for another family, or holds a tensor without a place.
    """
    weights = open_weights(path)
    names = _names(weights)
    if names is None:
        raise ModelError(f"{path} holds no T2I-Adapter; give the file or folder of one")
    stored = Stored.of(path, names.prefix, {n: t.shape for n, t in weights.tensors.items()})
    config = _config(path, stored, names)
    sources = {name: Source(name=names.stored(name)) for name in config.tensor_shapes()}
    component = assemble(path, weights, config, sources)
    refuse_left_over(path, weights, component.used())
    takes = [(place.width, place.level) for place in adapted_places(unet.tensor_shapes())]
    gives = config.features()
    if gives != takes[: len(gives)]:
        raise ModelError(
            f"{path} is a T2I-Adapter of another family: it makes features of (width, level) "
            f"{gives!s:.200}, and this model's UNet takes {takes}; give one that was trained for "
            "the model's family"
        )
    return config, component


def _names(names: Container[str]) -> _Names | None:
    for prefix in PREFIXES:
        for light, first in ((True, LIGHT), (False, FULL)):
            inner = "body.0.body.0." if light else "body.0."
            for original, block in ((True, inner), (False, "body.0.resnets.0.")):
                marks = (first, f"{block}block1.weight")
                if all(prefix + mark in names for mark in marks):
                    return _Names(prefix, light, original)
    return None


def _config(path: Path, stored: Stored, names: _Names) -> T2IAdapterConfig:
    """Read off an architecture; raises ModelError for one that is none of theirs."""
    inputs = stored.size(LIGHT if names.light else FULL, 1)
    if inputs not in INPUTS:
        raise ModelError(
            f"{path} is a T2I-Adapter that takes {inputs} channels; supported are "
            f"{', '.join(map(str, INPUTS))}, squares of 8 or 16 pixels in gray or colours"
        )
    in_channels, side = INPUTS[inputs]
    blocks = stored.count("body.{}")
    if names.light:
        inner = "body" if names.original else "resnets"
        return T2IAdapterConfig(
            channels=tuple(stored.size(f"body.{i}.out_conv.weight") for i in range(blocks)),
            in_channels=in_channels,
            downscale_factor=side,
            num_res_blocks=stored.count(f"body.0.{inner}.{{}}"),
            light=True,
        )
    per_feature = BLOCKS if names.original else stored.count("body.0.resnets.{}")
    first = "body.{}." + ("" if names.original else "resnets.0.")
    numbers = range(0, blocks, BLOCKS if names.original else 1)
    return T2IAdapterConfig(
        channels=tuple(stored.size(first.format(i) + "block2.weight") for i in numbers),
        in_channels=in_channels,
        downscale_factor=side,
        num_res_blocks=per_feature,
        kernel=stored.size(first.format(0) + "block2.weight", 2),
        strided=any(re.search(r"\.down_opt\.op\.weight$", name[-30:]) for name in stored.shapes),
    )
