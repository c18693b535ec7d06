"""How a picture is given to a user's ONNX file.

The sides and the dtype are those of the file's input. What that leaves open is read from a
`preprocessor_config.json` of transformers beside the file, then from the file's metadata (`size`,
`mean`, `std`), and options come before both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError
from runtime.checks import check_number
from runtime.images.canvas import MAX_SIDE

__all__ = ["PictureInput"]

Three = tuple[float, float, float]

CONFIG, CONFIG_BYTES = "preprocessor_config.json", 2**20
MAX_CELLS = 4096 * 4096  # pixels of the input
SIDE_MULTIPLE, OPEN_SIDE = 32, 1024  # of an input whose sides are open
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
WHITE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureInput:
    """The input of an ONNX file that takes a picture.

    name, dtype: of the input; channels_last: whether it is (1, H, W, 3), or (1, 3, H, W)
    size: height and width that the picture is stretched to, None for its own
    mean, std: a float is (x / 255 - mean) / std of the picture's bytes x; bytes stay as they are
    """

    name: str
    dtype: str
    channels_last: bool
    size: tuple[int, int] | None
    mean: Three
    std: Three

    @classmethod
    def of(cls, path: Path, session: Any, options: Mapping[str, Any]) -> "PictureInput":
        """Read how a picture is given to an opened file; raises RequestError where it takes none.

        options: size, mean and std, None where the file says
        """
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        is_picture = len(inputs) == 1 and len(shape) == 4 and inputs[0].type in DTYPES
        channels_last = is_picture and shape[3] == 3
        if not is_picture or not (channels_last or shape[1] == 3 or not isinstance(shape[1], int)):
            took = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise RequestError(
                f"{path} takes {took[:300] or 'nothing'}; a preprocessor takes one picture, "
                "(1, 3, H, W) or (1, H, W, 3) of float32, float16 or uint8"
            )
        sides = shape[1:3] if channels_last else shape[2:]
        said = {**_of_config(path), **_of_metadata(path, session)}
        said |= {name: value for name, value in options.items() if value is not None}
        fixed = [side if isinstance(side, int) else None for side in sides]
        return cls(
            name=inputs[0].name,
            dtype=DTYPES[inputs[0].type],
            channels_last=channels_last,
            size=_size(path, said.get("size"), fixed),
            mean=_three(path, "mean", said.get("mean", (0, 0, 0))),
            std=_three(path, "std", said.get("std", (1, 1, 1))),
        )

    def array(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Return (H, W, 3) uint8 as the file takes it."""
        down, across = self.size or _open_size(*pixels.shape[:2])
        image = Image.fromarray(pixels).resize((across, down), Image.Resampling.BICUBIC)
        given: NDArray[Any] = np.asarray(image)
        if self.dtype != "uint8":
            floats = given.astype(np.float32) / np.float32(WHITE)
            mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
            given = ((floats - mean) / std).astype(self.dtype)
        return np.ascontiguousarray(
            (given if self.channels_last else given.transpose(2, 0, 1))[None]
        )


def _of_metadata(path: Path, session: Any) -> dict[str, Any]:
    """Read size, mean and std off the file's metadata, numbers with commas or an x between."""
    stated = session.get_modelmeta().custom_metadata_map
    found: dict[str, Any] = {}
    for name in {"size", "mean", "std"} & stated.keys():
        try:
            numbers = [float(each) for each in stated[name][:100].replace("x", ",").split(",")]
        except ValueError as error:
            raise RequestError(
                f"the metadata of {path} say that {name} is {stated[name][:100]!r}; give it as an "
                "option"
            ) from error
        found[name] = [int(n) if n.is_integer() else n for n in numbers]
    return found


def _of_config(path: Path) -> dict[str, Any]:
    """Read size, mean and std off transformers' configuration beside the file, if there is one."""
    config = path.with_name(CONFIG)
    try:
        with config.open("rb") as file:
            stated = json.loads(file.read(CONFIG_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{config} cannot be read ({error}); mend it or move it away") from error
    if not isinstance(stated, Mapping):
        return {}
    found = {}
    if stated.get("do_normalize", True):
        found = {n: stated[f"image_{n}"] for n in ("mean", "std") if f"image_{n}" in stated}
    size = stated.get("size")
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        found["size"] = [size["height"], size["width"]]
    return found


def _size(path: Path, said: Any, fixed: Sequence[int | None]) -> tuple[int, int] | None:
    """Return the sides of the input: those that the file fixes, else what is said of them."""
    if said is not None:
        sides = said if isinstance(said, Sequence) and not isinstance(said, str) else [said]
        said = [*sides] * 2 if len(sides) == 1 else [*sides]
        if len(said) != 2:
            raise RequestError(f"the size of {path} is {said!r}; give a height and a width")
    if None not in fixed:
        if said is not None and list(said) != list(fixed):
            raise RequestError(
                f"{path} takes {fixed[1]} x {fixed[0]} pixels and no others, and {said[1]} x "
                f"{said[0]} are asked for; leave the size out"
            )
        said = fixed
    if said is None:
        return None
    for side in said:
        check_number(f"a side of the input of {path}", side, Integral, 1, MAX_SIDE)
    height, width = said
    if height * width > MAX_CELLS:
        raise RequestError(f"{path} takes {width} x {height} pixels; up to 4096 x 4096 are given")
    return int(height), int(width)


def _open_size(height: int, width: int) -> tuple[int, int]:
    """Return a picture's sides as an open input is given them: no larger, multiples of 32."""
    scale = min(1.0, OPEN_SIDE / max(height, width))
    down, across = (
        SIDE_MULTIPLE * max(1, round(side * scale / SIDE_MULTIPLE)) for side in (height, width)
    )
    return down, across


def _three(path: Path, name: str, numbers: Any) -> Three:
    """Return a number for each channel; raises RequestError."""
    several = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    given = [*numbers] if several else [numbers]
    given = given * 3 if len(given) == 1 else given
    if len(given) != 3:
        raise RequestError(f"{name} of {path} is {numbers!r}; give one number or three")
    for number in given:
        check_number(f"{name} of {path}", number, Real, 1e-6 if name == "std" else -1e6, 1e6)
    return float(given[0]), float(given[1]), float(given[2])
