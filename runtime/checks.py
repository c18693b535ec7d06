"""Checks of what a user hands over; each raises RequestError: what came, what is allowed."""

from collections.abc import Sequence
from numbers import Integral

from PIL import Image

from engine.errors import RequestError


def check_picture(name: str, image: object) -> None:
    """Refuse what is no picture of PIL's, and one whose file cannot be read."""
    if not isinstance(image, Image.Image):
        raise RequestError(
            f"{name} came as {type(image).__name__}; give a PIL image (PIL.Image.open of a file)"
        )
    if not image.width or not image.height:
        raise RequestError(
            f"{name} has {image.width} x {image.height} pixels; give one with at least one"
        )
    try:
        image.load()  # PIL reads files late
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(
            f"{name} cannot be read ({error}); give one whose file is whole and open"
        ) from error


def texts(name: str, values: object) -> list[str]:
    """Return a list of texts, refusing all else."""
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise RequestError(
            f"{name} came as {type(values).__name__}; give a text or a list of texts"
        )
    for value in values:
        if not isinstance(value, str):
            raise RequestError(f"{name} holds a {type(value).__name__}; every prompt is a text")
    return list(values)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not one of some names."""
    if value not in tuple(choices):
        raise RequestError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    """Refuse what is no number of a kind, Integral or Real, from low to high."""
    # bool counts as a number in Python, but nobody means True pixels.
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        what = "whole number" if kind is Integral else "number"
        raise RequestError(f"{name} is {value!r}; give a {what} from {low} to {high}")
