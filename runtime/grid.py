"""`latentrt grid PROMPT --x NAME=VALUE,VALUE …`: pictures over two or three options, on a sheet.

The cells are rows that share calls of the UNet, even where their samplers and steps differ. Every
option of `latentrt draw` that belongs to one picture may be an axis, and `prompt`, whose first
value is replaced in the texts by each of its values (Automatic1111's "Prompt S/R").
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from engine.errors import RequestError, exit_status
from runtime.images.files import SOURCE_KEY, check_output, write_image
from runtime.images.previews import side_by_side
from runtime.images.upscaling import Hires
from runtime.options import FIELDS, HIRES, load_arguments, make_parser
from runtime.pipeline import Pipeline
from runtime.regions import parse_region
from runtime.request import Request
from runtime.steering_options import steering_of
from runtime.terminal import say

MAX_CELLS = 256
NOT_HERE = (
    *("again", "expand", "preview_steps", "preview_decoder", "animation"),
    *("upscale", "safety_checker", "watermark", "c2pa_cert", "c2pa_key"),
)
# fields that the command line gives as files
FILES = ("image", "mask", "controls", "image_prompts", "regions")
PROMPT = "prompt"  # the axis whose first value is replaced in the texts by each of its values


class Axis(NamedTuple):
    """An option as the command line names it, and the values that it takes."""

    name: str
    values: tuple[str, ...]


def main(arguments: Sequence[str] | None = None, prog: str = "latentrt grid") -> int:
    """Run the command; return its exit status: 0, or 2 for a user's mistake."""
    return exit_status(lambda: _draw(arguments, prog))


def read_axis(text: str) -> Axis:
    """Read NAME=VALUE,VALUE; a value with a comma stands in quotes. Raises RequestError."""
    name, _, values = text.partition("=")
    found = tuple(value.strip() for value in next(csv.reader([values], skipinitialspace=True), []))
    if not name.strip() or not found or not all(found):
        raise RequestError(f"{text!r} is no axis; write NAME=VALUE,VALUE, such as steps=10,20")
    return Axis(name.strip().lstrip("-"), found)


def _draw(arguments: Sequence[str] | None, prog: str) -> None:
    parser = make_parser(prog)
    for name in "xyz":
        parser.add_argument(f"--{name}", metavar="NAME=V,V", help=f"the sheet's {name} axis")
    given = list(sys.argv[1:] if arguments is None else arguments)
    base = parser.parse_args(given)
    if base.prompt is None or base.x is None:
        parser.error("give a PROMPT and --x NAME=VALUE,VALUE")
    for name in NOT_HERE:
        if getattr(base, name):
            raise RequestError(f"--{name.replace('_', '-')} is for `latentrt draw`; leave it out")
    axes = [read_axis(text) if text else Axis("", ("",)) for text in (base.x, base.y, base.z)]
    out = base.out or Path("grid.png")
    check_output(out)
    cells = list(product(*(axis.values for axis in axes)))
    if len(cells) > MAX_CELLS:
        raise RequestError(f"the sheet has {len(cells)} cells; up to {MAX_CELLS} are drawn")
    if base.seed is None:
        given = ["--seed", "0", *given]  # cells differ by their axes alone
    requests = [_cell(parser, given, axes, values) for values in cells]
    pipeline = Pipeline.load(base.model, **load_arguments(base))
    found = {image.request: image for image in pipeline.draw(requests)}
    notes = dict.fromkeys([*pipeline.notes, *(note for i in found for note in found[i].notes)])
    for note in notes:
        say(f"note: {note}", sys.stderr)
    drawn = {cell: found[index].image for index, cell in enumerate(cells)}
    for page, z in enumerate(axes[2].values, start=1):
        rows = [[drawn[x, y, z] for x in axes[0].values] for y in axes[1].values]
        captions = [f"{axes[0].name} {x} {axes[2].name} {z}".strip() for x in axes[0].values]
        labels = [f"{axes[1].name} {y}".strip() for y in axes[1].values]
        sheet = side_by_side(rows, captions, labels if any(labels) else ())
        sheet.info[SOURCE_KEY] = rows[0][0].info[SOURCE_KEY]
        path = out if len(axes[2].values) == 1 else out.with_stem(f"{out.stem}-{page}")
        write_image(sheet, path, {}, mark=base.mark)
        print(path)


def _cell(
    parser: argparse.ArgumentParser, given: list[str], axes: Sequence[Axis], values: Sequence[str]
) -> Request:
    """Make a cell's request, of the command line with the axes' options behind it."""
    actions = {option: a for a in parser._actions for option in a.option_strings}
    extra: list[str] = []
    replaced: dict[str, str] = {}
    for axis, value in zip(axes, values, strict=True):
        if not axis.name:
            continue
        if axis.name == PROMPT:
            replaced[axis.values[0]] = value
            continue
        action = actions.get(f"--{axis.name}")
        belongs = action is not None and action.dest in {*FIELDS, *HIRES} - {*FILES}
        if not belongs or action is None or action.nargs == 0 or axis.name == "num-images":
            raise RequestError(
                f"{axis.name} is no axis; take prompt or an option of one picture that has a "
                "value, such as sampler, steps, guidance-scale or seed"
            )
        extra.append(f"--{axis.name}={value}")
    options = parser.parse_args([*given, *extra])
    if options.image or options.mask or options.num_images_per_prompt != 1:
        raise RequestError("a sheet has one picture a cell, drawn from a text alone")
    for searched, value in replaced.items():
        if searched not in options.prompt + options.negative_prompt:
            raise RequestError(
                f"{searched!r} is in neither the prompt nor the negative prompt; an axis of the "
                "prompt begins with words of theirs, whose place its other values take"
            )
        options.prompt = options.prompt.replace(searched, value)
        options.negative_prompt = options.negative_prompt.replace(searched, value)
    fields = {name: getattr(options, name) for name in FIELDS}
    fields |= steering_of(options)
    fields["regions"] = tuple(parse_region(*pair) for pair in options.regions)
    hires = {field: getattr(options, name) for name, field in HIRES.items()}
    if options.hires_scale is not None:
        fields["hires"] = Hires(**{k: v for k, v in hires.items() if v is not None})
    return Request(**fields)
