"""`--again` on a command line, and what a file keeps for it."""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.shipped import find_control
from engine.store.cache import fingerprint
from runtime.found_settings import FILES, ONNX, parted, settings_of
from runtime.images.files import program_version
from runtime.images.upscaling import is_trained
from runtime.options import MADE_WITH, PIECES
from runtime.output_options import UPSAMPLING
from runtime.request import idle_fields
from runtime.samplers import takes, takes_eta
from runtime.steering_options import STEERING_FIELDS
from runtime.terminal import say

__all__ = ["made_with", "parse_again"]

OF_A_PRESET = (
    *("num_inference_steps", "guidance_scale", "guidance_rescale", "sampler", "schedule"),
    *("height", "width"),
)


def parse_again(
    make_parser: Callable[[], argparse.ArgumentParser],
    arguments: Sequence[str] | None,
    names: Collection[str],
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read a command line; with `--again` what a picture was made with stands in for the rest.

    make_parser: makes the command's parser; names: of the options that a file may give
    Returns the parser, whose defaults are the picture's, and the options; says notes on them.
    Raises RequestError as `settings_of` does.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.again:
        actions = [action for action in parser._actions if action.dest in names]
        folders = [folder for folder in (options.lora_dir, options.upscaler_dir) if folder]
        given = _given(make_parser(), arguments)
        found, notes = settings_of(options.again, actions, given, folders)
        for note in [*notes, *_give_way(found, options, given)]:
            say(f"note: {note}", sys.stderr)
        parser.set_defaults(**found)
        options = parser.parse_args(arguments)
    if options.upscaler_dir:
        from runtime.upscaler_folder import settle_upscalers  # no plain prompt needs it

        settle_upscalers(options)
    return parser, options


def _give_way(
    found: dict[str, Any], options: argparse.Namespace, given: Collection[str]
) -> Iterator[str]:
    """Take out what was found and clashes with options that the user gives; yields notes."""
    if options.preset:  # which fills in what nobody says
        for name in {*OF_A_PRESET} - {*given}:
            found.pop(name, None)
    sampler, schedule = options.sampler, found.get("schedule")
    if sampler and schedule and not takes(sampler, schedule):
        del found["schedule"]
        yield f"{options.again} has the schedule {schedule!r}, which {sampler} cannot take"
    if sampler and not takes_eta(sampler):
        found.pop("eta", None)
    if "variation_strength" in given and not options.variation_strength:
        found.pop("variation_seed", None)
    needed = ("image", "mask", "extend", "inpaint_area")
    drawn = (getattr(options, name) if name in given else found.get(name) for name in needed)
    for name in idle_fields(*drawn)[1]:
        found.pop(name, None)


def _given(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> set[str]:
    """Return the names of the options that the user gives himself."""
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(arguments)))


def made_with(options: argparse.Namespace, model: Path, *more: str) -> dict[str, Any]:
    """Collect what makes a picture again beside the request: files by their names and hashes.

    model: the file or folder of the model that was loaded
    more: names of options that count where they are given, beside those of every command
    """
    asked = ("upscale", *UPSAMPLING, "watermark", "regions", *PIECES, *more)
    names = [*MADE_WITH, *(name for name in asked if getattr(options, name, None))]
    names += ("image", "mask") if options.image else ()
    names += [name for name in STEERING_FIELDS if getattr(options, name)]
    given = {name: getattr(options, name) for name in names}
    files = {name: value for name in FILES if (value := given.get(name)) and name != "model"}
    given |= {name: _base_names(value) for name, value in files.items()}
    model = model.resolve()
    each = [(n, one) for n, v in files.items() for one in (v if isinstance(v, list) else [v])]
    each = [(n, one) for n, one in each if n != "control_preprocessors" or str(one).endswith(ONNX)]
    if options.hires_upscaler and is_trained(options.hires_upscaler):
        each.append(("hires_upscaler", options.hires_upscaler))
    paths = {model.name: model}
    for name, one in each:
        path = Path(parted(name, one)[0])
        paths[path.name] = find_control(path) if name == "controls" else path
    hashes = {name: fingerprint(path) for name, path in paths.items() if path.exists()}
    return {**given, "model": model.name, "hashes": hashes, "latentrt": program_version()}


def _base_names(value: Any) -> Any:
    """Return an option's files without their folders; of a pair of texts the first is the file."""
    if isinstance(value, Path | str):
        return Path(value).name
    return [Path(o).name if isinstance(o, Path | str) else [Path(o[0]).name, *o[1:]] for o in value]
