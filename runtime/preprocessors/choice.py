"""A preprocessor by its name, with its numbers behind it, or by the ONNX file that it is."""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError, choice, nearest
from runtime.preprocessors.named import PREPROCESSORS, Preprocessor
from runtime.preprocessors.onnx_file import OnnxPreprocessor

__all__ = ["find_preprocessor", "named_preprocessor", "preprocess"]

ONNX = ".onnx"
FLAGS = {"true": True, "false": False}


def find_preprocessor(text: str) -> Preprocessor:
    """Return a preprocessor: as `named_preprocessor` reads it, or a file `FILE.onnx`.

    Raises RequestError, BackendError.
    """
    if text.lower().endswith(ONNX):
        return OnnxPreprocessor.load(text)
    return named_preprocessor(text, or_else=", or give an ONNX file, FILE.onnx")


def named_preprocessor(text: str, *, or_else: str = "") -> Preprocessor:
    """Return one of PREPROCESSORS, which opens no file: "canny" or "canny:low=50,high=120".

    or_else: what may be given beside them, for the sentence. Raises RequestError.
    """
    name, colon, numbers = text.partition(":")
    made = PREPROCESSORS.get(name)
    if made is None:
        said = choice(name, PREPROCESSORS, or_else=or_else)
        raise RequestError(f"there is no preprocessor {name[:100]!r}; {said}")
    own = {field.name: field for field in fields(made)}
    given: dict[str, Any] = {}
    for pair in numbers.split(",") if colon else ():
        option, _, value = pair.partition("=")
        option = option.strip().replace("-", "_")
        if option not in own:
            near, listed = nearest(option, own), ", ".join(own) or "none"
            has = f"did you mean {near!r}? It has" if near else "it has"
            raise RequestError(
                f"{option[:60]!r} is no option of the preprocessor {name}; {has} {listed}"
            )
        given[option] = _read(f"{option} of {name}", value.strip(), type(own[option].default))
    found: Preprocessor = made(**given)
    return found


def preprocess(name: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make the hint of a picture: (H, W, 3) uint8 -> (H, W, 3) uint8.

    name: as `find_preprocessor` takes it, which is to be kept for several pictures
    Raises RequestError, BackendError.
    """
    return find_preprocessor(name)(pixels)


def _read(name: str, text: str, kind: type) -> float | bool:
    """Read an option's value as its default is; raises RequestError."""
    if kind is bool:
        if text.lower() not in FLAGS:
            raise RequestError(f"{name} is {text[:40]!r}; give true or false")
        return FLAGS[text.lower()]
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} is {text[:40]!r}; give {what}") from None
