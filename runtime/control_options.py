"""The options of `python -m runtime` on controls, and the controls that they make."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import RequestError
from runtime.control import BALANCED, MODES, NONE, Control, parse_control
from runtime.images.files import open_image

__all__ = ["CONTROL_FIELDS", "CONTROL_OPTIONS", "control_files", "controls_of"]

# What steers the drawing by pictures, as `argparse` takes it.
CONTROL_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--control": {
            "dest": "controls",
            "action": "append",
            "default": [],
            "metavar": "FILE[:WEIGHT[@START:END]]",
            "help": "a ControlNet's or T2I-Adapter's file or folder, or edges, which ships, which "
            "sees --control-image; may be given several times, each with a picture; see "
            "docs/control.md",
        },
        "--control-image": {
            "dest": "control_images",
            "action": "append",
            "type": Path,
            "default": [],
            "metavar": "PICTURE",
            "help": "what the --control in the same place sees: edges, depth, a pose",
        },
        "--control-mode": {
            "dest": "control_modes",
            "action": "append",
            "default": [],
            "metavar": "MODE",
            "help": f"{', '.join(MODES)}: what is more important, for all or for each --control "
            f"(default: {BALANCED})",
        },
        "--control-type": {
            "dest": "control_types",
            "action": "append",
            "default": [],
            "metavar": "TYPE",
            "help": "what the --control-image is, for all or for each --control: openpose, depth, "
            "scribble, canny, normal, segment, tile, repaint; unions of ControlNets alone ask for "
            "it: none for other nets",
        },
        "--preprocessor": {
            "dest": "control_preprocessors",
            "action": "append",
            "default": [],
            "metavar": "NAME[:OPTION=X,…]",
            "help": "what makes of --control-image what the --control sees, for all or for each: "
            "canny, canny:low=50,high=120, FILE.onnx, none (default: what its file names, such as "
            "canny of edges, or none); see docs/preprocessors.md",
        },
    }
)
CONTROL_FIELDS = (
    *("controls", "control_images", "control_modes", "control_types"),
    "control_preprocessors",
)


def control_files(options: argparse.Namespace) -> dict[str, Path]:
    """Return the ControlNets to load, by the names that `controls_of` gives them: the files."""
    return {net: Path(net) for net, *_ in map(parse_control, options.controls)}


def controls_of(options: argparse.Namespace) -> list[Control]:
    """Make the controls; reads the pictures. Raises RequestError where one lacks its picture."""
    given, pictures = options.controls, options.control_images
    if len(given) != len(pictures):
        raise RequestError(
            f"--control came {len(given)} times and --control-image {len(pictures)} times; give "
            "them in pairs"
        )
    modes = _for_each("--control-mode", options.control_modes, len(given), BALANCED)
    made = _for_each("--preprocessor", options.control_preprocessors, len(given), "")
    types = _for_each("--control-type", options.control_types, len(given), NONE)
    controls, opened = [], {}
    said = zip(given, map(Path, pictures), modes, types, made, strict=True)
    for text, path, mode, kind, how in said:
        net, weights, start, end = parse_control(text)
        if path not in opened:
            opened[path] = open_image(path)
        controls.append(
            Control(
                net=net,
                image=opened[path],
                weight=weights,
                start=start,
                end=end,
                mode=mode,
                type=None if kind == NONE else kind,
                preprocessor=how or None,
            )
        )
    return controls


def _for_each(option: str, said: list[str], count: int, default: str) -> list[str]:
    """Return what an option says of each control; raises RequestError where it is not clear."""
    if len(said) not in (0, 1, count) or (said and not count):
        raise RequestError(
            f"{option} came {len(said)} times for {count} of --control; give one for all, or one "
            "for each"
        )
    return said * count if len(said) == 1 else said or [default] * count
