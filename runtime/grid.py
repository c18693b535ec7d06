"""`latentrt grid PROMPT --x NAME=VALUE,VALUE …`: pictures over two or three options, on a sheet.

The cells are rows that share calls of the UNet, even where their samplers and steps differ. Every
option of `latentrt draw` that belongs to one picture may be an axis, and `prompt`, whose first
value is replaced in the texts by each of its values (Automatic1111's "Prompt S/R").
"""

import argparse
import secrets
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from engine.command_line import CommandParser
from engine.errors import RequestError, exit_status, nearest
from runtime.again import made_with, parse_again
from runtime.axes import Axis, read_axis
from runtime.checks import FOREIGN_NAMES
from runtime.finishing import picture_size
from runtime.found_settings import AXES
from runtime.images.files import (
    FIRST_CELL,
    SOURCE_KEY,
    SPACING_KEY,
    Sign,
    check_output,
    write_image,
)
from runtime.images.previews import sheet_size, side_by_side
from runtime.images.watermark import check_watermark_size, embed_watermark
from runtime.options import (
    AGAIN,
    FIELDS,
    HIRES,
    load_arguments,
    make_parser,
    make_request,
    marking,
    read_pictures,
)
from runtime.output_options import UPSAMPLING
from runtime.pipeline import Pipeline
from runtime.request import OF_AN_IMAGE, Request
from runtime.result import DrawnImage
from runtime.terminal import Loading, say, show_progress
from runtime.upscaler_folder import settle_upscalers

MAX_CELLS = 256
OF_SIZE = ("height", "width", "preset", "hires", "extend")  # fields that axes may change
ANY_SEED = -1
SEEDS = ("seed", "variation_seed")
NOT_HERE = (
    *("expand", "preview_steps", "preview_decoder", "animation"),
    *("upscale", "safety_checker", "safety_action"),
    *UPSAMPLING,
)
# fields that the command line gives as files
FILES = ("image", "mask", "controls", "image_prompts", "regions")
PROMPT = "prompt"  # the axis whose first value is replaced in the texts by each of its values
KEPT = {*AGAIN, *AXES, "wildcard_dir"} - {*NOT_HERE}  # what a sheet's file gives again


Cell = tuple[str, ...]  # the value of each axis


def main(arguments: Sequence[str] | None = None, prog: str = "latentrt grid") -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    return exit_status(
        lambda: _draw(list(sys.argv[1:] if arguments is None else arguments), prog),
        cancelled="cancelled; only the sheets named above were written",
        wording=lambda sentence: _parser(prog).in_options(sentence),
    )


def _parser(prog: str) -> CommandParser:
    parser = make_parser(prog)
    for name in AXES:
        parser.add_argument(f"--{name}", metavar="NAME=V,V", help=f"the sheet's {name} axis")
    return parser


def _draw(arguments: list[str], prog: str) -> None:
    parser, options = parse_again(partial(_parser, prog), arguments, KEPT)
    if options.prompt is None or options.x is None:
        parser.error("give a PROMPT and --x NAME=VALUE,VALUE, or --again with a sheet")
    for name in NOT_HERE:
        if getattr(options, name):
            raise RequestError(f"--{name.replace('_', '-')} is for `latentrt draw`; leave it out")
    axes = _axes(parser, options)
    sign = marking(options)
    paths = _paths(options.out or Path("grid.png"), len(axes[2].values))
    _settle_seeds(options)
    cells = list(product(*(axis.values for axis in axes)))
    if len(cells) > MAX_CELLS:
        raise RequestError(f"the sheet has {len(cells)} cells; up to {MAX_CELLS} are drawn")
    pictures = read_pictures(options)
    requests = {
        cell: make_request(_cell(parser, arguments, options, axes, cell), pictures)
        for cell in cells
    }
    loading = Loading(options.model)
    with loading:
        pipeline = Pipeline.load(options.model, **load_arguments(options))
        loading.note(*pipeline.notes)
    chosen = pipeline.engines  # what was chosen makes the same sheet again
    options.backend, options.precision = chosen.settings.backend, chosen.precision
    settings = _settings(options, pipeline, axes)
    told = {*pipeline.notes}
    pages = [
        {cell: request for cell, request in requests.items() if cell[2] == z}
        for z in axes[2].values
    ]
    if options.watermark:
        for asked in pages:
            check_watermark_size(*_sheet_size(pipeline, asked, axes))
    for path, asked in zip(paths, pages, strict=True):
        sheet, first = _sheet(pipeline, asked, axes, told, batch_size=options.batch_size)
        kept = {**settings, FIRST_CELL: {**first, "model": settings["model"]}}
        say(str(_write(sheet, path, kept, options, sign)), sys.stdout)


def _write(
    sheet: Image.Image,
    path: Path,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
    sign: Sign | None,
) -> Path:
    """Write a sheet, marked as the options say; returns where it is."""
    if options.watermark:
        sheet = embed_watermark(sheet, options.watermark)
    replaces = options.out is not None
    return write_image(sheet, path, settings, mark=options.mark, sign=sign, replaces=replaces)


def _axes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Axis]:
    """Return the three axes, one without a name for each that is not given. Raises RequestError."""
    axes: list[Axis] = []
    for text in (getattr(options, name) for name in AXES):
        axis = read_axis(text) if text else Axis("", ("",))
        if axis.name and axis.name != PROMPT:
            axis = axis._replace(name=_option(parser, axis.name))
            if axis.name != PROMPT and axis.name in [other.name for other in axes]:
                raise RequestError(f"{axis.name} is two axes; give each option once")
        if axis.name.replace("-", "_") in SEEDS:
            values = (str(_any_seed(value)) for value in axis.values)
            axis = axis._replace(values=tuple(values))
        axes.append(axis)
    return axes


def _option(parser: argparse.ArgumentParser, name: str) -> str:
    """Return the option that an axis names, without its dashes. Raises RequestError."""
    known: dict[str, str] = {}
    for action in parser._actions:
        if (
            action.dest in {*FIELDS, *HIRES} - {*FILES, "num_images_per_prompt"}
            and action.nargs != 0
        ):
            long = next((o[2:] for o in action.option_strings if o.startswith("--")), "")
            if long:
                known |= {long: long, action.dest.replace("_", "-"): long}
    if name in known:
        return known[name]
    meant = FOREIGN_NAMES.get(name.replace("-", "_").replace(" ", "_"), "").replace("_", "-")
    close = known.get(meant) or known.get(nearest(name, known))
    hint = f"did you mean {close}? An axis is" if close else "take"
    raise RequestError(
        f"{name} is no axis; {hint} prompt or an option of one picture that has a value, such as "
        "sampler, steps, guidance-scale or seed"
    )


def _any_seed(value: str) -> str | int:
    """Return a value of an axis of seeds, one that is drawn for -1."""
    return secrets.randbelow(2**32) if value == str(ANY_SEED) else value


def _settle_seeds(options: argparse.Namespace) -> None:
    """Give the options the seeds that cells without their own have: cells differ by their axes."""
    for name in SEEDS:
        if getattr(options, name) == ANY_SEED:
            setattr(options, name, secrets.randbelow(2**32))
    options.seed = 0 if options.seed is None else options.seed


def _paths(out: Path, count: int) -> list[Path]:
    """Return where the sheets go, numbered if there are several. Raises OutputError."""
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
    for path in paths:
        check_output(path)
    return paths


def _cell(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    base: argparse.Namespace,
    axes: Sequence[Axis],
    cell: Cell,
) -> argparse.Namespace:
    """Return a cell's options: the command line with the axes' behind it. Raises RequestError."""
    given = [(axis, value) for axis, value in zip(axes, cell, strict=True) if axis.name]
    own = [f"--{axis.name}={value}" for axis, value in given if axis.name != PROMPT]
    options = parser.parse_args([*arguments, *own])
    settle_upscalers(options)
    for name in SEEDS:
        if getattr(options, name) in (None, ANY_SEED):
            setattr(options, name, getattr(base, name))
    if options.variation_strength and options.variation_seed is None:
        options.variation_seed = 0
    several = "--seed" if isinstance(options.seed, tuple) else "--num-images"
    if options.num_images_per_prompt != 1 or isinstance(options.seed, tuple):
        raise RequestError(
            f"{several} asks for several pictures, and a sheet has one picture a cell; draw seeds "
            "as an axis, such as --y seed=7,9"
        )
    for axis, value in given:
        if axis.name == PROMPT:
            _replace_in_texts(options, axis.values[0], value)
    return options


def _replace_in_texts(options: argparse.Namespace, searched: str, value: str) -> None:
    """Put a value in the place of the words that the axis begins with. Raises RequestError."""
    if searched not in options.prompt + options.negative_prompt:
        raise RequestError(
            f"{searched!r} is in neither the prompt nor the negative prompt; an axis of the "
            "prompt begins with words of theirs, whose place its other values take"
        )
    options.prompt = options.prompt.replace(searched, value)
    options.negative_prompt = options.negative_prompt.replace(searched, value)


def _settings(
    options: argparse.Namespace, pipeline: Pipeline, axes: Sequence[Axis]
) -> dict[str, Any]:
    """Return what makes the sheet again: its axes, and the options that hold for every cell."""
    named = {name: axis.named.text for name, axis in zip(AXES, axes, strict=True) if axis.name}
    without = {*FILES, "num_images_per_prompt", *(() if options.image else OF_AN_IMAGE)}
    shared = {
        name: value
        for name in (*FIELDS, *HIRES)
        if name not in without and (value := getattr(options, name)) is not None
    }
    if options.hires_upscaler is not None:
        shared["hires_upscaler"] = Path(options.hires_upscaler).name
    return {**named, **shared, **made_with(options, pipeline.model_path, "wildcard_dir")}


def _sheet(
    pipeline: Pipeline,
    requests: Mapping[Cell, Request],
    axes: Sequence[Axis],
    told: set[str],
    batch_size: int | None,
) -> tuple[Image.Image, Mapping[str, Any]]:
    """Draw the cells of one value of the z axis; returns them on a sheet, and the first's settings.

    told: notes that were said, to which new ones are added
    """
    cells, drawn = list(requests), dict[Cell, DrawnImage]()
    for each in pipeline.draw(list(requests.values()), batch_size=batch_size):
        drawn[cells[each.request]] = each
        show_progress(len(drawn), len(cells), noun="picture")
        for note in (note for note in each.notes if note not in told):
            told.add(note)
            say(f"note: {note}", sys.stderr)
    (x, y, _), page = axes, cells[0][2]
    rows = [[drawn[across, down, page].image for across in x.values] for down in y.values]
    sheet = side_by_side(rows, *_texts(axes, page))
    sheet.info |= {key: rows[0][0].info[key] for key in (SOURCE_KEY, SPACING_KEY)}
    return sheet, drawn[cells[0]].settings


def _texts(axes: Sequence[Axis], page: str) -> tuple[list[str], list[str]]:
    """Return the captions above a sheet's columns and the labels beside its rows.

    page: its value of the z axis
    """
    x, y, z = axes
    (shown,) = z._replace(values=(page,)).named.values
    captions = [f"{x.name} {value} {z.name} {shown}".strip() for value in x.named.values]
    labels = [f"{y.name} {value}".strip() for value in y.named.values]
    return captions, labels if any(labels) else []


def _sheet_size(
    pipeline: Pipeline, requests: Mapping[Cell, Request], axes: Sequence[Axis]
) -> tuple[int, int]:
    """Return the width and height of a sheet that is not drawn yet."""
    unlike = {tuple(getattr(r, name) for name in OF_SIZE): r for r in requests.values()}
    cells = [picture_size(pipeline.plan(request)) for request in unlike.values()]
    width, height = map(max, zip(*cells, strict=True))
    x, y, _ = axes
    page = next(iter(requests))[2]
    return sheet_size(len(y.values), len(x.values), (width, height), *_texts(axes, page))


if __name__ == "__main__":
    sys.exit(main())
