"""Upscalers: files of ESRGAN, Real-ESRGAN and SwinIR, in whichever names their programs gave, and
of the diffusion upsamplers that are trained here.

ESRGAN's files come with three sets of names: BasicSR's (`body.0.rdb1.conv1`), those of the authors'
later code (`RRDB_trunk.0.RDB1.conv1`) and of their first (`model.1.sub.0.RDB1.conv1.0`). Training
programs save a dictionary that holds the model once or twice, `params` and `params_ema`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.component import Component, Source, assemble, refuse_left_over, shown
from engine.checkpoints.formats.files import open_weights
from engine.configs.base import Shape
from engine.configs.upsampler import NORM_GROUPS, UpsamplerConfig
from engine.configs.upscalers import (
    COLOURS,
    CompactConfig,
    ESRGANConfig,
    SwinIRConfig,
    UpscalerConfig,
)
from engine.errors import ModelError

__all__ = ["UpscalerFile", "is_upscaler", "open_upscaler"]

MAX_SCALE, MAX_WINDOW = 16, 16
JPEG_WINDOW = 7  # of the SwinIR that takes out what JPEG left, beside blocks of 8
MAX_TENSORS = 20_000
ADVICE = (
    "give a file of ESRGAN, Real-ESRGAN (also the compact ones) or SwinIR, or one that "
    "`python -m training upsampler` wrote"
)
CONV_IN = "conv_in.weight"
UPSAMPLER = "upsampler."  # stands before the names, which other UNets have too
AVERAGED = "ema"  # in what stands before the names of averaged weights, which are the better ones
# SwinIR's files hold numbers that follow from the window's size.
UNUSED = r".+\.(relative_position_index|attn_mask)|(.+\.)?(mean|step|num_batches_tracked)"

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UpscalerFile:
    """An upscaler's architecture, and its weights under its graph's names, mapped.

    kind: what it is called
    notes: what of the file is not used, a sentence each
    """

    path: Path
    kind: str
    config: UpscalerConfig
    weights: Component
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """How files name one architecture.

    mark: a tensor that only they have
    read: reads the architecture off the shapes, by the stored names
    stored: returns the stored name of a tensor of the graph
    """

    kind: str
    mark: str
    read: Callable[[Shapes], UpscalerConfig]
    stored: Callable[[str, UpscalerConfig], str]


def is_upscaler(names: Iterable[str]) -> bool:
    """Tell by the names of tensors whether a file seems to be an upscaler."""
    return _find(dict.fromkeys(names, ())) is not None


def open_upscaler(path: Path) -> UpscalerFile:
    """Open an upscaler's file: its architecture and its weights.

    Raises ModelError when it is none that is known here, and for any tensor that is missing, left
    over or of another shape.
    """
    weights = open_weights(path)
    if len(weights) > MAX_TENSORS:
        raise ModelError(
            f"{path} holds {len(weights)} tensors, and no upscaler more than {MAX_TENSORS}; "
            f"{ADVICE}"
        )
    found = _find(weights)
    if found is None:
        listed = ", ".join(shown(name, 60) for name in list(weights)[:3]) or "nothing"
        raise ModelError(
            f"{path} is no upscaler that is known here: it holds {len(weights)} tensors such as "
            f"{listed}; {ADVICE}"
        )
    layout, prefix = found
    shapes = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    try:
        config = layout.read(shapes)
    except _UnknownShapeError as error:
        raise ModelError(
            f"{path} seems to be an upscaler ({layout.kind}), and {error}; {ADVICE}"
        ) from error
    if config.scale > MAX_SCALE:
        raise ModelError(
            f"{path} enlarges {config.scale} times; up to {MAX_SCALE} are taken: {ADVICE}"
        )
    names = {name: layout.stored(name, config) for name in config.tensor_shapes()}
    sources = {name: Source(name=prefix + stored) for name, stored in names.items()}
    component = assemble(path, weights, config, sources)
    twins = _twins(weights, set(names.values()), component.used())
    refuse_left_over(path, weights, component.used() | twins, UNUSED)
    notes = (f"the weights under {prefix.rstrip('.')} are used, not those beside them",)
    return UpscalerFile(
        path=path,
        kind=layout.kind,
        config=config,
        weights=component,
        notes=notes if twins else (),
    )


class _UnknownShapeError(Exception):
    """What an architecture cannot be, as a clause."""


def _find(names: Mapping[str, object]) -> tuple[_Layout, str] | None:
    """Return how a file names its tensors, and what stands before all of them."""
    for layout in _LAYOUTS:
        prefixes = [name.removesuffix(layout.mark) for name in names if name.endswith(layout.mark)]
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        if prefixes:
            return layout, min(prefixes, key=lambda prefix: (AVERAGED not in prefix, len(prefix)))
    return None


def _twins(names: Iterable[str], stored: set[str], used: set[str]) -> set[str]:
    """Return the tensors that hold the same model once more, under another dictionary's name."""
    others = {name: name.partition(".")[2] for name in names if name not in used}
    return {name for name, rest in others.items() if rest in stored}


def _shape(shapes: Shapes, name: str, axes: int = 4) -> Shape:
    shape = shapes.get(name)
    if shape is None:
        raise _UnknownShapeError(f"has no {name}")
    if len(shape) != axes or not all(shape):
        raise _UnknownShapeError(f"{name} has the shape {list(shape)}")
    return shape


def _count(shapes: Shapes, pattern: str, start: int = 0) -> int:
    """Count the numbers, from the start on, that a name is there with; pattern: with {} for it."""
    number = start
    while pattern.format(number) in shapes:
        number += 1
    return number - start


def _require_colours(channels: int, wanted: int, verb: str) -> None:
    if channels != wanted:
        raise _UnknownShapeError(
            f"it {verb} {channels} channels, where pictures here have {COLOURS} colours"
        )


def _read_esrgan(shapes: Shapes, first: str, dense: str, last: str, doublings: int) -> ESRGANConfig:
    """Read the architecture; dense: the first layer of a dense block, with {} for its number."""
    width, channels = _shape(shapes, first)[:2]
    unshuffle = math.isqrt(channels // COLOURS)
    _require_colours(channels, COLOURS * unshuffle**2 or COLOURS, "takes")
    _require_colours(_shape(shapes, last)[0], COLOURS, "gives")
    if unshuffle not in (1, 2, 4) or 2**doublings % unshuffle:
        raise _UnknownShapeError(f"it takes pictures apart by {unshuffle}")
    return ESRGANConfig(
        num_feat=width,
        num_block=_count(shapes, dense),
        num_grow_ch=_shape(shapes, dense.format(0))[0],
        doublings=doublings,
        unshuffle=unshuffle,
        plus=any(name.endswith(".conv1x1.weight") for name in shapes),
    )


def _read_basicsr(shapes: Shapes) -> ESRGANConfig:
    doublings = _count(shapes, "conv_up{}.weight", 1)
    dense = "body.{}.rdb1.conv1.weight"
    return _read_esrgan(shapes, "conv_first.weight", dense, "conv_last.weight", doublings)


def _read_trunk(shapes: Shapes) -> ESRGANConfig:
    doublings = _count(shapes, "upconv{}.weight", 1)
    dense = "RRDB_trunk.{}.RDB1.conv1.weight"
    return _read_esrgan(shapes, "conv_first.weight", dense, "conv_last.weight", doublings)


def _read_numbered(shapes: Shapes) -> ESRGANConfig:
    """Beside those that enlarge, three convolutions have a number: the first and the last two."""
    found = (re.fullmatch(r"model\.(\d{1,2})\.weight", name) for name in shapes)
    numbered = sorted(int(match[1]) for match in found if match)
    if len(numbered) < 3:
        raise _UnknownShapeError("it lacks layers at its end")
    dense, last = "model.1.sub.{}.RDB1.conv1.0.weight", f"model.{numbered[-1]}.weight"
    return _read_esrgan(shapes, "model.0.weight", dense, last, len(numbered) - 3)


def _basicsr_name(name: str, config: UpscalerConfig) -> str:
    return name


def _trunk_name(name: str, config: UpscalerConfig) -> str:
    name = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", name)
    for ours, theirs in (("conv_body", "trunk_conv"), ("conv_up", "upconv"), ("conv_hr", "HRconv")):
        name = name.replace(ours, theirs)
    return name


def _numbered_name(name: str, config: UpscalerConfig) -> str:
    """Layers without weights count too: the enlarging before a convolution, the ReLU behind it."""
    assert isinstance(config, ESRGANConfig)
    if dense := re.fullmatch(r"body\.(\d+)\.rdb(\d)\.(conv\w+)\.(\w+)", name):
        block, number, conv, kind = dense.groups()
        inner = conv if conv == "conv1x1" else f"{conv}.0"
        return f"model.1.sub.{block}.RDB{number}.{inner}.{kind}"
    layer, kind = name.rsplit(".", 1)
    end = 3 * config.doublings + 2
    numbers = {f"conv_up{i + 1}": str(3 * i + 3) for i in range(config.doublings)}
    numbers |= {"conv_first": "0", "conv_body": f"1.sub.{config.num_block}"}
    numbers |= {"conv_hr": str(end), "conv_last": str(end + 2)}
    return f"model.{numbers[layer]}.{kind}"


def _read_compact(shapes: Shapes) -> CompactConfig:
    """Convolutions have even numbers, and the PReLUs between them odd ones."""
    layers = _count({n: s for n, s in shapes.items() if len(s) in (1, 4)}, "body.{}.weight")
    width, channels = _shape(shapes, "body.0.weight")[:2]
    _require_colours(channels, COLOURS, "takes")
    outputs = _shape(shapes, f"body.{layers - 1}.weight")[0]
    upscale = math.isqrt(outputs // COLOURS)
    _require_colours(outputs, COLOURS * upscale**2 or COLOURS, "gives")
    if layers < 5:
        raise _UnknownShapeError(f"it has {layers} layers")
    return CompactConfig(num_feat=width, num_conv=(layers - 3) // 2, upscale=upscale)


def _read_swinir(shapes: Shapes) -> SwinIRConfig:
    groups = _count(shapes, "layers.{}.residual_group.blocks.0.norm1.weight")
    block = "layers.{}.residual_group.blocks.{}."
    table = block + "attn.relative_position_bias_table"
    rows = _shape(shapes, table.format(0, 0), 2)[0]
    width, channels = _shape(shapes, "conv_first.weight")[:2]
    _require_colours(channels, COLOURS, "takes")
    window = (math.isqrt(rows) + 1) // 2
    if rows != (2 * window - 1) ** 2 or not 1 < window <= MAX_WINDOW:
        raise _UnknownShapeError(f"its windows have {rows} distances")
    heads = tuple(_shape(shapes, table.format(i, 0), 2)[1] for i in range(groups))
    if any(width % number for number in heads):
        raise _UnknownShapeError(f"its width {width} is not a multiple of its heads {heads}")
    upsampler, upscale, features = _enlarging(shapes)
    is_for_jpeg = not upsampler and window == JPEG_WINDOW  # its authors train it on 0 to 255
    return SwinIRConfig(
        embed_dim=width,
        depths=tuple(_count(shapes, block.format(i, "{}") + "norm1.weight") for i in range(groups)),
        num_heads=heads,
        hidden_dim=_shape(shapes, block.format(0, 0) + "mlp.fc1.weight", 2)[0],
        window_size=window,
        upscale=upscale,
        upsampler=upsampler,
        num_feat=features,
        three_convs="conv_after_body.0.weight" in shapes,
        img_range=255 if is_for_jpeg else 1,
    )


def _enlarging(shapes: Shapes) -> tuple[str, int, int]:
    """Tell how a SwinIR enlarges, how many times, and through how many features."""
    if "conv_before_upsample.0.weight" not in shapes:
        if "upsample.0.weight" not in shapes:
            _require_colours(_shape(shapes, "conv_last.weight")[0], COLOURS, "gives")
            return "", 1, 1
        outputs = _shape(shapes, "upsample.0.weight")[0]
        upscale = math.isqrt(outputs // COLOURS)
        _require_colours(outputs, COLOURS * upscale**2 or COLOURS, "gives")
        return "pixelshuffledirect", upscale, 1
    features = _shape(shapes, "conv_before_upsample.0.weight")[0]
    _require_colours(_shape(shapes, "conv_last.weight")[0], COLOURS, "gives")
    if "conv_up1.weight" in shapes:
        return "nearest+conv", 2 ** _count(shapes, "conv_up{}.weight", 1), features
    factor = math.isqrt(_shape(shapes, "upsample.0.weight")[0] // features)
    if factor == 3:
        return "pixelshuffle", 3, features
    steps = sum(f"upsample.{2 * i}.weight" in shapes for i in range(5))
    return "pixelshuffle", 2**steps, features


def _read_upsampler(shapes: Shapes) -> UpsamplerConfig:
    down, first = "down_blocks.{}.resnets.0.conv1.weight", _shape(shapes, UPSAMPLER + CONV_IN)
    levels = _count(shapes, UPSAMPLER + down)
    widths = tuple(_shape(shapes, UPSAMPLER + down.format(i))[0] for i in range(levels))
    layers = _count(shapes, UPSAMPLER + "down_blocks.0.resnets.{}.conv1.weight")
    upscale = math.isqrt(first[1] // (2 * COLOURS))
    if not upscale or first[1] != 2 * COLOURS * upscale**2:
        raise _UnknownShapeError(f"it takes {first[1]} channels, no pixels of two pictures")
    if not widths or any(width % NORM_GROUPS for width in widths):
        raise _UnknownShapeError(f"its levels have the widths {widths}, not multiples of 8")
    return UpsamplerConfig(block_out_channels=widths, layers_per_block=layers, upscale=upscale)


def _upsampler_name(name: str, config: UpscalerConfig) -> str:
    return UPSAMPLER + name


_LAYOUTS = (
    _Layout("SwinIR", "layers.0.residual_group.blocks.0.norm1.weight", _read_swinir, _basicsr_name),
    _Layout("ESRGAN", "body.0.rdb1.conv1.weight", _read_basicsr, _basicsr_name),
    _Layout("ESRGAN", "RRDB_trunk.0.RDB1.conv1.weight", _read_trunk, _trunk_name),
    _Layout("ESRGAN", "model.1.sub.0.RDB1.conv1.0.weight", _read_numbered, _numbered_name),
    _Layout("compact ESRGAN (SRVGG)", "body.1.weight", _read_compact, _basicsr_name),
    _Layout("diffusion", UPSAMPLER + CONV_IN, _read_upsampler, _upsampler_name),
)
