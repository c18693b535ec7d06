"""A preprocessor by its name, or by the ONNX file that it is."""

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.preprocessors.named import PREPROCESSORS, Preprocessor
from runtime.preprocessors.onnx_file import OnnxPreprocessor

__all__ = ["find_preprocessor", "preprocess"]

ONNX = ".onnx"


def find_preprocessor(name: str) -> Preprocessor:
    """Return a preprocessor with its defaults: one of PREPROCESSORS, or a file `FILE.onnx`.

    Others are made of their classes, as `Canny(low=50)`. Raises RequestError, BackendError.
    """
    if name in PREPROCESSORS:
        found: Preprocessor = PREPROCESSORS[name]()
        return found
    if name.lower().endswith(ONNX):
        return OnnxPreprocessor.load(name)
    raise RequestError(
        f"there is no preprocessor {name!r}; choose one of {', '.join(PREPROCESSORS)}, or give an "
        "ONNX file, FILE.onnx"
    )


def preprocess(name: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make the hint of a picture: (H, W, 3) uint8 -> (H, W, 3) uint8.

    name: as `find_preprocessor` takes it, which is to be kept for several pictures
    Raises RequestError, BackendError.
    """
    return find_preprocessor(name)(pixels)
