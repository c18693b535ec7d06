"""A control-LoRA: a ControlNet as differences of low rank from the UNet that it steers.

Stability's files hold, beside the hint's encoder and the convolutions of one pixel, for a layer
`X.weight` of the UNet's way down two factors, `X.up` and `X.down`, whose product is added to it,
and whole tensors in the place of others, such as biases and norms. All else is the UNet's own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.component import Component, Source, assemble, refuse_left_over, shown
from engine.checkpoints.formats.files import Weights
from engine.configs.base import Shape
from engine.configs.control_net import ControlNetConfig
from engine.errors import ModelError

__all__ = ["MARK", "ControlLora", "is_control_lora", "make_control_lora"]

MARK = "lora_controlnet"
UP, DOWN, WEIGHT = ".up", ".down", ".weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlLora(Mapping[str, NDArray[Any]]):
    """A ControlNet's tensors under its graph's names, computed when they are asked for.

    base: the UNet's, of the same names; own: those that the file holds whole
    factors: names of the stored tensors up and down, by the name of what they are added to
    """

    base: Component
    own: Component
    factors: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, Shape]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Take a tensor; raises KeyError when the graph has none of this name."""
        if name in self.own:
            return self.own[name]
        weight = self.base[name]
        if name not in self.factors:
            return weight
        up, down = (
            np.asarray(self.own.weights[stored], np.float32) for stored in self.factors[name]
        )
        added = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return np.asarray(weight, np.float32) + added.reshape(weight.shape)

    def __iter__(self) -> Iterator[str]:
        """Go through the graph's names, in its order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Tell whether the graph has a tensor of this name, without touching it."""
        return name in self.shapes

    def release(self) -> None:
        """Give back the memory of what was read; it is read again."""
        self.own.release()
        self.base.weights.release()

    def used(self) -> set[str]:
        """Return the names of the stored tensors that are taken."""
        return self.own.used() | {name for pair in self.factors.values() for name in pair}


def is_control_lora(names: Mapping[str, Any]) -> bool:
    """Tell whether tensors of these names are a control-LoRA's, a ControlNet's among them."""
    if MARK in names:
        return True
    return any(n.endswith(UP) and n.removesuffix(UP) + DOWN in names for n in names)


def make_control_lora(
    path: Path,
    weights: Weights,
    config: ControlNetConfig,
    sources: Mapping[str, Source],
    base: Component,
) -> ControlLora:
    """Find every tensor, in the file or in the UNet.

    sources: where a whole ControlNet of this layout holds each; base: the UNet's tensors
    Raises ModelError for one that is nowhere, has no place or does not fit this UNet.
    """
    shapes = config.tensor_shapes()
    held = {name: source for name, source in sources.items() if source.name in weights}
    own = assemble(path, weights, config, held)
    factors = dict[str, tuple[str, str]]()
    for name, source in sources.items():
        if name in held:
            continue
        if name not in base.shapes:
            raise ModelError(
                f"{path} is a control-LoRA and lacks {source.name}, which its UNet has not either; "
                "the file is incomplete: download it or save it again"
            )
        if base.shapes[name] != shapes[name]:
            raise ModelError(
                f"{path} is a control-LoRA without {source.name}, and that of this model's UNet "
                f"has shape {list(base.shapes[name])} in place of {list(shapes[name])}; give it "
                "with a model for text to image"
            )
        pair = tuple(source.name.removesuffix(WEIGHT) + side for side in (UP, DOWN))
        there = [stored for stored in pair if stored in weights]
        if there and source.name.endswith(WEIGHT):
            _check_pair(path, weights, pair, name, shapes[name])
            factors[name] = (pair[0], pair[1])
    made = ControlLora(base=base, own=own, factors=factors, shapes=shapes)
    refuse_left_over(path, weights, made.used(), MARK)
    return made


def _check_pair(
    path: Path, weights: Weights, pair: tuple[str, ...], name: str, shape: Shape
) -> None:
    """Raise ModelError for factors whose product is not of a weight's shape."""
    found = [weights.tensors.get(stored) for stored in pair]
    up, down = (tensor.shape if tensor is not None else () for tensor in found)
    rank = up[1] if len(up) > 1 else 0
    rows, columns = (shape[0], _count(shape[1:]))
    fits = rank > 0 and up[0] == rows and _count(up) == rows * rank
    if not (fits and down and down[0] == rank and _count(down) == rank * columns):
        raise ModelError(
            f"{path} is a control-LoRA of another family: {shown(pair[0], 100)} and "
            f"{shown(pair[1], 100)} have shapes {list(up)} and {list(down)}, and {name} of this "
            f"model's UNet has {list(shape)}; give one that was trained for the model's family"
        )
    if not all(tensor is not None and tensor.is_float for tensor in found):
        raise ModelError(f"{path}: {shown(pair[0], 100)} is of a dtype that is no weight's")


def _count(shape: Shape) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
