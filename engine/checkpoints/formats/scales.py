"""Scales beside weights of one byte: whose they are, and what kinds are read.

Programs that quantise a model keep a number for a whole weight, for each of its rows or for blocks
of it, by which what is stored is to be multiplied: without it a model draws white. ComfyUI wrote
`scale_weight`, and since 2025 `weight_scale` with a description `comfy_quant` of every layer;
optimum-quanto keeps `_data` and `_scale` in the place of the weight.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.float8 import FLOAT8
from engine.checkpoints.formats.tensors import StoredTensor, damaged, short
from engine.errors import ModelError

__all__ = ["with_scales"]

# What a scale's name ends in, and what its weight's name ends in instead.
ENDINGS = (
    (".scale_weight", ".weight"),
    ("weight_scale", "weight"),
    ("weight_scale_inv", "weight"),  # of DeepSeek's blocks; it is multiplied by all the same
    ("weight.scale", "weight"),
    (".weight._scale", ".weight._data"),
)
ENDS = tuple(ending for ending, _ in ENDINGS)
FLOATS = ("F16", "BF16", "F32", "F64")  # of scales
DATA = "._data"
DESCRIPTION = ".comfy_quant"
DESCRIPTIONS = "_quantization_metadata"
MAX_DESCRIPTION = 4096  # bytes; a layer's has some 30


def with_scales(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Mapping[str, StoredTensor]:
    """Give every weight its scale, and leave the scales out; the same mapping if there are none.

    Raises ModelError naming a scale that does not fit, or a layer whose numbers are of a kind that
    is not read (of 4 bits, or rotated).
    """
    described = dict(_descriptions(path, tensors, metadata))
    scales = {name: weight for name in tensors if (weight := _weight(name, tensors))}
    for layer, format_ in described.items():
        _check_format(path, layer, format_)
        name = f"{layer}.weight"
        if name in tensors and tensors[name].dtype in FLOAT8 and name not in scales.values():
            raise damaged(path, f"{short(layer)} is said to be scaled, and its scale is missing")
    if not scales:
        return tensors
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for name, weight in scales.items():
        found[weight] = replace(found[weight], scale=_fitted(path, name, tensors, weight))
    return {_plain(name, found): tensor for name, tensor in found.items()}


def _weight(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return the weight that a name is the scale of, if it is one."""
    if not name.endswith(ENDS):
        return None
    ends = ((name.removesuffix(own) + its) for own, its in ENDINGS if name.endswith(own))
    return next((weight for weight in ends if weight in tensors), None)


def _plain(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the weight's own name, where its values are kept under another."""
    plain = name.removesuffix(DATA)
    return plain if plain == name or plain not in tensors else name


def _fitted(
    path: Path, name: str, tensors: Mapping[str, StoredTensor], weight: str
) -> StoredTensor:
    """Give a scale as many dimensions as its weight has, each of a size that divides the weight's.

    Sizes of 1 at the end may be missing, or too many.
    """
    scale, shape = tensors[name], tensors[weight].shape
    sizes = list(scale.shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    sizes += [1] * (len(shape) - len(sizes))
    fits = len(sizes) == len(shape) and all(
        size and not whole % size for size, whole in zip(sizes, shape, strict=True)
    )
    if scale.dtype not in FLOATS or not fits or scale.strides:
        raise damaged(
            path,
            f"{short(name)}, {scale.dtype} of shape {short(list(scale.shape))}, is no scale of "
            f"{short(weight)}, which has shape {short(list(shape))}",
        )
    return replace(scale, shape=tuple(sizes))


def _descriptions(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """Go through what a file says of its layers' numbers: a JSON object for each layer."""
    if DESCRIPTIONS in metadata:
        layers = _parse(path, DESCRIPTIONS, metadata[DESCRIPTIONS]).get("layers")
        yield from (layers if isinstance(layers, dict) else {}).items()
    for name, tensor in tensors.items():
        if name.endswith(DESCRIPTION):
            if tensor.dtype != "U8" or tensor.strides or math.prod(tensor.shape) > MAX_DESCRIPTION:
                raise damaged(path, f"{short(name)} is no description of a layer")
            text = tensor.array().tobytes().decode("utf-8", "replace")
            yield name.removesuffix(DESCRIPTION), _parse(path, name, text)


def _parse(path: Path, name: str, text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{short(name)} holds no valid JSON ({error})") from error
    if not isinstance(described, dict):
        raise damaged(path, f"{short(name)} is a {type(described).__name__}, not an object")
    return described


def _check_format(path: Path, layer: str, described: Any) -> None:
    """Raise ModelError unless a layer's numbers only need to be multiplied by a scale."""
    described = described if isinstance(described, dict) else {}
    format_ = described.get("format")
    rotated = any(value for key, value in described.items() if key in ("convrot", "hadamard"))
    if not str(format_).startswith(("float8_", "int8_")) or rotated:
        kind = f"rotated {format_}" if rotated else format_
        raise ModelError(
            f"{path}: {short(layer)} is quantised as {short(kind)}, which is not read; take the "
            "model in float8, float16 or bfloat16, or as GGUF"
        )
