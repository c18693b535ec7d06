"""A tiny decoder for previews alone: TAESD's file or a folder of diffusers' AutoencoderTiny."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from engine.checkpoints.component import Component, Source, assemble, refuse_left_over
from engine.checkpoints.formats.files import open_weights
from engine.configs.base import Shape
from engine.configs.diffusion import TINY_LEVELS, TinyDecoderConfig
from engine.errors import ModelError

__all__ = ["open_tiny_decoder"]

LAYERS = "decoder.layers."
ENCODER = r"encoder\..+"  # the other half, which diffusers keeps in the same file


def open_tiny_decoder(path: Path) -> tuple[TinyDecoderConfig, Component]:
    """Open a tiny decoder: a folder, or a file with the names of diffusers or of TAESD.

    TAESD's own files hold the layers alone, and count the limiting of the latents as the first.
    Raises ModelError when it is none, and for any tensor that has no place.
    """
    weights = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    prefix, shift = (LAYERS, 0) if f"{LAYERS}0.weight" in shapes else ("", 1)
    config = TinyDecoderConfig.load(path) if path.is_dir() else _config(path, shapes, prefix, shift)
    sources = {}
    for name in config.tensor_shapes():
        number, rest = name.removeprefix(LAYERS).split(".", 1)
        sources[name] = Source(name=f"{prefix}{int(number) + shift}.{rest}")
    component = assemble(path, weights, config, sources)
    refuse_left_over(path, weights, component.used(), ENCODER)
    return config, component


def _config(path: Path, shapes: Mapping[str, Shape], prefix: str, shift: int) -> TinyDecoderConfig:
    """Read an architecture off the shapes: between two layers are the blocks of a level."""
    layers = _numbers(shapes, rf"{re.escape(prefix)}(\d{{1,4}})\.weight")
    blocks = _numbers(shapes, rf"{re.escape(prefix)}(\d{{1,4}})\.conv\.0\.weight")
    counts = [sum(a < block < b for block in blocks) for a, b in pairwise(layers)]
    first = shapes.get(f"{prefix}{shift}.weight", ())
    if len(counts) != TINY_LEVELS or not all(counts) or len(first) != 4:
        raise ModelError(
            f"{path} holds no tiny decoder such as TAESD's; give a taesd_decoder or "
            "taesdxl_decoder file, or a folder of diffusers' AutoencoderTiny"
        )
    return TinyDecoderConfig(
        latent_channels=first[1],
        decoder_block_out_channels=(first[0],) * TINY_LEVELS,
        num_decoder_blocks=tuple(counts),
    )


def _numbers(shapes: Mapping[str, Shape], pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in shapes)
    return sorted(int(match[1]) for match in found if match)
