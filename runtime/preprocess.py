"""`latentrt preprocess NAME PICTURE --out HINT.png`: make the hint of a control of a picture."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.command_line import CommandParser
from engine.errors import RequestError, choice, exit_status
from engine.store.cache import write_atomically
from runtime.images.canvas import gray_of
from runtime.images.files import as_rgb, check_output, open_image
from runtime.preprocessors.named import PREPROCESSORS, Preprocessor, inpaint_hint
from runtime.preprocessors.onnx_file import OnnxPreprocessor
from runtime.text_options import read_numbers

INPAINT = "inpaint"
ONNX_OPTIONS = ("size", "mean", "std", "invert", "threads")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m runtime.preprocess") -> int:
    """Run the command; return its exit status. prog: what the usage calls it."""
    parser = _parser(prog)
    return exit_status(lambda: _make(parser.parse_args(arguments)), wording=parser.in_options)


def _parser(prog: str) -> CommandParser:
    parser = CommandParser(
        prog=prog,
        description="Make the hint of a control of a picture, as large as the picture.",
        epilog="numbers that are left out take the preprocessor's own: "
        + "; ".join(f"{name} {_defaults(made)}" for name, made in PREPROCESSORS.items()),
    )
    add = parser.add_argument
    names = ", ".join((*PREPROCESSORS, INPAINT))
    add("name", metavar="NAME", help=f"{names}, or an ONNX file, FILE.onnx")
    add("picture", type=Path, metavar="PICTURE", help="the picture to look at")
    add("-o", "--out", type=Path, required=True, metavar="HINT.png", help="where to write the hint")
    add("--low", type=float, metavar="X", help="of canny: an edge goes on above it")
    add("--high", type=float, metavar="X", help="of canny: an edge begins above it")
    add("--l2-norm", action="store_true", default=None, help="of canny: a gradient's true length")
    add("--threshold", type=int, metavar="N", help="of scribble: 0 to 255, a lower draws more")
    add("--factor", type=float, metavar="X", help="of tile: how many times smaller pixels are kept")
    add("--sigma", type=float, metavar="PIXELS", help="of blur: its standard deviation")
    add("--mask", type=Path, metavar="FILE", help="of inpaint: white where it is painted anew")
    three = partial(read_numbers, float, ",", None)
    add(
        "--size",
        type=partial(read_numbers, int, "x", None),
        metavar="HEIGHTxWIDTH",
        help="of an ONNX file: what the picture is stretched to (default: as the file says)",
    )
    add("--mean", type=three, metavar="R,G,B", help="of an ONNX file: taken from 0 to 1")
    add("--std", type=three, metavar="R,G,B", help="of an ONNX file: what that is divided by")
    add("--invert", action="store_true", default=None, help="of an ONNX file: black for white")
    add("--threads", type=int, metavar="N", help="of an ONNX file")
    return parser


def _make(options: argparse.Namespace) -> None:
    check_output(options.out)
    if options.name == INPAINT:
        hint = _inpaint(options)
    else:
        preprocessor = _preprocessor(options)
        hint = Image.fromarray(preprocessor(np.asarray(as_rgb(open_image(options.picture)))))
    form = Image.registered_extensions()[options.out.suffix.lower()]
    write_atomically(options.out, lambda file: hint.save(file, form))
    print(options.out)


def _inpaint(options: argparse.Namespace) -> Image.Image:
    """Return the picture, transparent where it is painted anew."""
    _check_given(options, {"mask"})
    if options.mask is None:
        raise RequestError("inpaint came without --mask; give what is to be painted anew in white")
    if options.out.suffix.lower() in (".jpg", ".jpeg"):
        raise RequestError(f"{options.out} has no transparency; give a PNG or a WebP")
    pixels = np.asarray(as_rgb(open_image(options.picture)))
    hint = inpaint_hint(pixels, gray_of(open_image(options.mask), *pixels.shape[:2]))
    kept = (hint[..., :1] >= 0) * np.uint8(255)
    return Image.fromarray(np.concatenate([pixels, kept.astype(np.uint8)], axis=2))


def _preprocessor(options: argparse.Namespace) -> Preprocessor:
    if options.name in PREPROCESSORS:
        made = PREPROCESSORS[options.name]
        given = _check_given(options, {f.name for f in fields(made)})
        chosen: Preprocessor = made(**given)
        return chosen
    if not options.name.lower().endswith(".onnx"):
        or_else = ", or give an ONNX file, FILE.onnx"
        said = choice(options.name, (*PREPROCESSORS, INPAINT), or_else=or_else)
        raise RequestError(f"there is no preprocessor {options.name!r}; {said}")
    given = _check_given(options, set(ONNX_OPTIONS))
    return OnnxPreprocessor.load(options.name, **given)


def _check_given(options: argparse.Namespace, known: set[str]) -> dict[str, Any]:
    """Return the options that were given of those that this preprocessor has; refuse others."""
    own = {"name", "picture", "out"}
    given = {n: v for n, v in vars(options).items() if n not in own and v is not None}
    has = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(known))
    for name in given.keys() - known:
        raise RequestError(
            f"--{name.replace('_', '-')} is no option of {options.name}; "
            + f"it has {has or 'none'}"
        )
    return given


def _defaults(made: type[Any]) -> str:
    return ", ".join(f"{f.name} {f.default}" for f in fields(made)) or "has none"


if __name__ == "__main__":
    sys.exit(main())
