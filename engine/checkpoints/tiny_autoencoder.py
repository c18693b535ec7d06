"""Tiny autoencoders: a folder of diffusers' AutoencoderTiny, or files with its names or TAESD's.

TAESD's own files have one half each and hold the layers alone; the decoder's count the limiting of
the latents as the first. ComfyUI and stable-diffusion.cpp put a prefix before them.
"""

import re
from collections.abc import Container, Iterable, Mapping
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoints.component import Component, Source, assemble, refuse_left_over
from engine.checkpoints.formats.files import StoredTensor, Weights, open_weights
from engine.configs.base import Shape
from engine.configs.tiny_autoencoder import (
    TINY_LEVELS,
    TinyAutoencoderConfig,
    TinyDecoderConfig,
)
from engine.errors import ModelError

__all__ = [
    "find_halves",
    "has_tiny_decoder",
    "open_tiny_autoencoder",
    "open_tiny_decoder",
    "tiny_config",
    "tiny_sources",
    "wanted_sources",
]

ENCODER, DECODER = "encoder.layers.", "decoder.layers."
# By half: what the layers' numbers follow in files, and how much larger they are there.
PLACES: Mapping[str, tuple[tuple[str, int], ...]] = MappingProxyType(
    {
        ENCODER: ((ENCODER, 0), ("taesd_encoder.", 0), ("encoder.", 0), ("", 0)),
        DECODER: ((DECODER, 0), ("taesd_decoder.", 1), ("decoder.", 1), ("", 1)),
    }
)
LAYER = re.compile(r"(\d{1,4})\.((conv\.[024]\.)?(weight|bias))")
FIRST_BLOCK = {ENCODER: 1, DECODER: 2}  # by our numbers
PREFIXES = ("", "first_stage_model.", "vae.", "tae.")  # the last three in files of whole models
UNUSED = r"(.+\.)?vae_(scale|shift)"  # what ComfyUI has latents scaled by; these are in the sampler


def has_tiny_decoder(names: Container[str], prefix: str | None = None) -> bool:
    """Tell whether there is a tiny decoder, or an encoder; prefix: of its names, if known."""
    prefixes = PREFIXES if prefix is None else (prefix,)
    return any(_place(names, one, half) is not None for one in prefixes for half in PLACES)


def tiny_sources(names: Iterable[str], prefix: str) -> dict[str, Source]:
    """Say where the tensors of a tiny autoencoder are, by their names in diffusers'.

    names: of all tensors that a file has
    """
    names = list(names)
    sources: dict[str, Source] = {}
    for half in PLACES:
        place, shift = _place(set(names), prefix, half) or (None, 0)
        if place is not None:
            for name in names:
                match = LAYER.fullmatch(name.removeprefix(prefix + place))
                if match and name.startswith(prefix + place):
                    sources[f"{half}{int(match[1]) - shift}.{match[2]}"] = Source(name=name)
    return sources


def tiny_config(path: Path, shapes: Mapping[str, Shape]) -> TinyAutoencoderConfig:
    """Read a tiny autoencoder's architecture off its shapes, by its names in diffusers'.

    Of an encoder that is not there, it is the published one's. Raises ModelError.
    """
    fields = _decoder_fields(path, shapes)
    if any(name.startswith(ENCODER) for name in shapes):
        blocks, first = _levels(path, ENCODER, shapes)
        fields["num_encoder_blocks"] = blocks
        fields["encoder_block_out_channels"] = (first[0],) * TINY_LEVELS
    return TinyAutoencoderConfig(**fields)


def find_halves(path: Path) -> dict[str, dict[str, Shape]]:
    """Return the shapes that a file or folder holds of "encoder" and "decoder", as far as there.

    By their names in diffusers'. Raises ModelError for a tensor that has no place.
    """
    _, _, shapes = _open(path)
    halves = {
        half.partition(".")[0]: {n: shape for n, shape in shapes.items() if n.startswith(half)}
        for half in PLACES
    }
    return {half: held for half, held in halves.items() if held}


def open_tiny_decoder(path: Path) -> tuple[TinyDecoderConfig, Component]:
    """Open the decoder for previews; an encoder that is there is not used.

    Raises ModelError when it is none, and for any tensor that has no place.
    """
    weights, prefix, shapes = _open(path)
    if path.is_dir():
        config = TinyDecoderConfig.load(path)
    else:
        config = TinyDecoderConfig(**_decoder_fields(path, shapes))
    wanted = {name: _source(weights.tensors, prefix, name) for name in config.tensor_shapes()}
    return config, assemble(path, weights, config, wanted)


def open_tiny_autoencoder(path: Path) -> tuple[TinyAutoencoderConfig, Component]:
    """Open a tiny autoencoder; a file of the decoder alone takes the encoder's from beside it.

    Without an encoder, the decoder's tensors are all it has.
    Raises ModelError when it is none, and for any tensor that has no place.
    """
    weights, prefix, shapes = _open(path)
    encoder = path.with_name(path.name.replace("decoder", "encoder"))
    if encoder != path and path.is_file() and encoder.is_file():
        weights, shapes = _joined(path, encoder)
        prefix = ""
    config = TinyAutoencoderConfig.load(path) if path.is_dir() else tiny_config(path, shapes)
    return config, assemble(path, weights, config, wanted_sources(config, weights.tensors, prefix))


def wanted_sources(
    config: TinyAutoencoderConfig, names: Container[str], prefix: str
) -> dict[str, Source]:
    """Say where each tensor must be: those of the encoder only if there is one."""
    halves = [DECODER]
    if _place(names, prefix, ENCODER):
        halves.append(ENCODER)
    wanted = (name for name in config.tensor_shapes() if name.startswith(tuple(halves)))
    return {name: _source(names, prefix, name) for name in wanted}


def _joined(*paths: Path) -> tuple[Weights, dict[str, Shape]]:
    """Open files of one half each as one, under diffusers' names: TAESD's are the same in both."""
    files: dict[Path, mmap] = {}
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        weights, prefix, _ = _open(path)
        files |= weights.files
        for name, source in tiny_sources(weights.tensors, prefix).items():
            tensors[name] = weights.tensors[source.name]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Weights(files=files, tensors=tensors, metadata={}), shapes


def _open(path: Path) -> tuple[Weights, str, dict[str, Shape]]:
    """Open a file or folder; also its prefix, and its shapes by diffusers' names.

    Raises ModelError for a tensor that has no place.
    """
    weights = open_weights(path)
    prefix = next((one for one in PREFIXES if has_tiny_decoder(weights.tensors, one)), "")
    sources = tiny_sources(weights.tensors, prefix)
    if not sources:
        raise _foreign(path, DECODER)
    held = [name for name in weights.tensors if name.startswith(prefix)]
    refuse_left_over(path, held, {source.name for source in sources.values()}, UNUSED)
    shapes = {name: weights.tensors[source.name].shape for name, source in sources.items()}
    return weights, prefix, shapes


def _source(names: Container[str], prefix: str, name: str) -> Source:
    """Say where a tensor of diffusers' name is in a file."""
    half = next(half for half in PLACES if name.startswith(half))
    place, shift = _place(names, prefix, half) or (half, 0)
    number, _, rest = name.removeprefix(half).partition(".")
    return Source(name=f"{prefix}{place}{int(number) + shift}.{rest}")


def _place(names: Container[str], prefix: str, half: str) -> tuple[str, int] | None:
    """Find what the numbers of a half's layers follow, by its first layer and its first block."""
    for place, shift in PLACES[half]:
        first = f"{prefix}{place}{shift}.weight"
        if first in names and f"{prefix}{place}{FIRST_BLOCK[half] + shift}.conv.0.weight" in names:
            return place, shift
    return None


def _decoder_fields(path: Path, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    blocks, first = _levels(path, DECODER, shapes)
    return {
        "latent_channels": first[1],
        "decoder_block_out_channels": (first[0],) * TINY_LEVELS,
        "num_decoder_blocks": blocks,
    }


def _levels(path: Path, half: str, shapes: Mapping[str, Shape]) -> tuple[tuple[int, ...], Shape]:
    """Count the blocks of each level, which stand between two layers; also the first's shape."""
    layers = _numbers(shapes, rf"{re.escape(half)}(\d+)\.weight")
    blocks = _numbers(shapes, rf"{re.escape(half)}(\d+)\.conv\.0\.weight")
    counts = tuple(sum(a < block < b for block in blocks) for a, b in pairwise(layers))
    first = shapes.get(f"{half}0.weight", ())
    if len(counts) != TINY_LEVELS or not all(counts) or len(first) != 4:
        raise _foreign(path, half)
    return counts, first


def _foreign(path: Path, half: str) -> ModelError:
    return ModelError(
        f"{path} holds no tiny {half.partition('.')[0]} such as TAESD's; give a taesd_decoder "
        "or taesdxl_decoder file, or a folder of diffusers' AutoencoderTiny"
    )


def _numbers(shapes: Mapping[str, Shape], pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in shapes)
    return sorted(int(match[1]) for match in found if match)
