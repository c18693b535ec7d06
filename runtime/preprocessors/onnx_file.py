"""A user's ONNX file as a preprocessor: depth, pose, line art, segmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import BackendError, RequestError, first_line, install, memory_hint
from runtime.preprocessors.named import check_pixels
from runtime.preprocessors.onnx_check import check_onnx
from runtime.preprocessors.onnx_input import PictureInput

__all__ = ["OnnxPreprocessor"]

Pixels = NDArray[np.uint8]

WHITE = 255
CLASSES = 256  # that have a colour of their own


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxPreprocessor:
    """An ONNX file that makes hints; `load` opens one.

    given: how the picture is given to it
    invert: whether black and white of a hint of one channel change places
    """

    path: Path
    given: PictureInput
    invert: bool
    _session: Any = field(repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        invert: bool = False,
        threads: int | None = None,
    ) -> "OnnxPreprocessor":
        """Open a file whose one input is a picture.

        size, mean, std: in place of what the file says, as `PictureInput` has them
        Raises RequestError for a file that cannot be one, BackendError without onnxruntime.
        """
        path = Path(path)
        check_onnx(path)
        session = _open(path, threads)
        given = PictureInput.of(path, session, {"size": size, "mean": mean, "std": std})
        return cls(path=path, given=given, invert=invert, _session=session)

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8; raises BackendError where the file fails.

        One channel is spread from black to white, three are colours, several are classes, of which
        each has a colour (Pascal VOC's).
        """
        height, width = check_pixels(pixels).shape[:2]
        picture = self.given.array(pixels)
        try:
            made = np.asarray(self._session.run(None, {self.given.name: picture})[0])
        except Exception as error:  # the library's own exceptions share no base of their own
            raise BackendError(
                f"{self.path} failed on a picture of {picture.shape} ({first_line(error)})"
                f"{memory_hint(error)}"
            ) from error
        array = _squeezed(self.path, made)
        classes = _classes(array)
        if classes is not None:
            hint, resample = _colours(classes), Image.Resampling.NEAREST
        else:
            hint, resample = self._shades(array), Image.Resampling.BILINEAR
        return np.array(Image.fromarray(hint).resize((width, height), resample))

    def _shades(self, array: NDArray[Any]) -> Pixels:
        """Make (h, w, 3) uint8 of one channel or three."""
        if not np.isfinite(array).all():
            raise BackendError(
                f"{self.path} gave numbers that are not finite; give another picture"
            )
        if array.ndim == 2:
            values = array.astype(np.float64)
            gray = (values - values.min()) / (np.ptp(values) or 1)
            pixels = np.rint((1 - gray if self.invert else gray) * WHITE).astype(np.uint8)
            return np.repeat(pixels[..., None], 3, axis=2)
        is_bytes = array.dtype == np.uint8 or array.max() > 2
        scaled = (array + 1) / 2 if array.min() < 0 else array / (WHITE if is_bytes else 1)
        colours: Pixels = np.rint(scaled.clip(0, 1) * WHITE).astype(np.uint8)
        return colours


def _open(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"{path} needs onnxruntime, which is not installed; " + install("onnxruntime", "cpu")
        ) from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RequestError(
            f"{path} cannot be opened ({first_line(error)}); give one that ONNX Runtime runs"
        ) from error


def _squeezed(path: Path, made: NDArray[Any]) -> NDArray[Any]:
    """Return what a file gave as (h, w), or (h, w, channels)."""
    array = made
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    elif array.ndim == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiu" or not math.prod(array.shape):
        raise BackendError(
            f"{path} gave {made.dtype} {made.shape}; a preprocessor gives one picture, of one "
            "channel, three, or one for each class"
        )
    return array


def _classes(array: NDArray[Any]) -> NDArray[np.int64] | None:
    """Return the class of every pixel, where a file tells classes, by number or by likelihood."""
    if array.ndim == 3 and array.shape[2] != 3:
        return np.asarray(array.argmax(axis=2), np.int64)
    is_label = array.ndim == 2 and array.dtype.kind in "iu" and array.dtype != np.uint8
    return array.astype(np.int64) if is_label else None


def _colours(classes: NDArray[np.int64]) -> Pixels:
    """Colour classes as Pascal VOC does: bit by bit, in turn for red, green and blue."""
    palette, index = np.zeros((CLASSES, 3), np.int64), np.arange(CLASSES)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (index >> channel & 1) << (7 - bit)
        index = index >> 3
    coloured: Pixels = palette.astype(np.uint8)[classes % CLASSES]
    return coloured
