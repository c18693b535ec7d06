"""int8: layers whose inputs and weights are whole numbers of 8 bits, each with a scale.

Weights have a scale for each output channel, inputs one for the whole tensor, from the smallest and
the largest value that were seen. (Jacob et al. 2018, arXiv:1712.05877, section 2.1.) Dividing
the inputs' channels by factors that the weights take over (SmoothQuant, arXiv:2211.10438) and
cutting off the largest inputs were both tried: both lose several dB on the model that ships.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Ranges
from engine.errors import BackendError
from engine.store.cache import write_atomically

LARGEST = 127  # of a weight: -128 is left out, so that all are as far from 0 on both sides
LEVELS = 256  # of an input
ASYMMETRIC_BELOW = 0.7  # whose smallest value is nearer to 0 than this share of the largest
SAMPLE = 16  # numbers of each tensor that tell a checkpoint from others
# Few operations, but numbers that all later ones depend on: the timestep's and the text's
# embeddings, and what latents and pictures enter and leave by. The enlargements are computed in
# tiles, whose differences spread further than the numbers themselves. Shortcuts see the residual
# stream as it is, which spreads over far more than what norms give: with those in int8 the model
# that ships loses 4 dB more, and a decoder of Stable Diffusion 1.5's size 9.
FLOAT_LAYERS = (
    "time_emb",
    "add_embedding",
    "quant_conv",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "upsamplers",
    "attn2.to_k",
    "attn2.to_v",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight, (O, I, ...), as whole numbers; values * scales is the weight.

    values: (O, I, ...) int8; scales: (O, 1, ...) float32
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]


def is_quantized(name: str) -> bool:
    """Tell whether the layer with this weight computes in int8."""
    return name.endswith(".weight") and not any(part in name for part in FLOAT_LAYERS)


def quantize(weight: NDArray[Any]) -> QuantizedWeight:
    """Round a layer's weight, (O, I, ...) of floats."""
    wide = weight.astype(np.float32)
    scales = np.abs(wide).max(axis=tuple(range(1, wide.ndim)), keepdims=True) / LARGEST
    scales[scales == 0] = 1
    wide /= scales
    return QuantizedWeight(values=np.rint(wide, out=wide).astype(np.int8), scales=scales)


def input_range(low: float, high: float, *, shifted: bool) -> tuple[float, float]:
    """Return the range of 256 levels that holds inputs, one of them exactly 0.

    shifted: whether the layer can take a range that lies elsewhere than around 0
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if shifted and -low < ASYMMETRIC_BELOW * high:
        step = (high - low) / (LEVELS - 1)
        zero = round(-low / step)
        return -zero * step, (LEVELS - 1 - zero) * step
    largest = max(-low, high) or 1.0
    return -largest * (LARGEST + 1) / LARGEST, largest


def ranges_name(architecture: str, weights: Arrays) -> str:
    """Return the file name of a checkpoint's ranges: its architecture, and a hash of some numbers.

    Another checkpoint of the architecture has other numbers in nearly every tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name]
        start = array[(0,) * (array.ndim - 1)][:SAMPLE] if array.ndim else array
        digest.update(name.encode() + np.ascontiguousarray(start, np.float32).tobytes())
    return f"ranges-{architecture}-{digest.hexdigest()[:16]}.json"


def find_ranges(name: str, folders: Sequence[Path]) -> Ranges | None:
    """Read a checkpoint's ranges, if a folder has them; raises BackendError for a damaged file."""
    for path in (folder / name for folder in folders):
        if path.is_file():
            return _read(path)
    return None


def write_ranges(path: Path, ranges: Ranges) -> None:
    """Write ranges, whole or not at all; raises OutputError."""
    text = json.dumps(ranges, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def _read(path: Path) -> Ranges:
    try:
        read = json.loads(path.read_bytes())
        ranges = {name: (float(low), float(high)) for name, (low, high) in read.items()}
        if not np.isfinite(list(ranges.values())).all():
            raise ValueError("a number is not finite")
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise BackendError(
            f"{path} holds no ranges for int8 ({error}); delete it and run "
            "`python -m runtime.calibration` again"
        ) from error
    return ranges
