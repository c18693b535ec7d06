"""The options of `python -m runtime` on image prompts, and what they make."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from engine.errors import RequestError
from runtime.image_prompt import NO_MASK, ImagePrompt, parse_image_prompt
from runtime.images.files import FORMATS, open_image

__all__ = [
    "IMAGE_PROMPT_FIELDS",
    "IMAGE_PROMPT_OPTIONS",
    "image_prompts_of",
    "ip_adapter_arguments",
]

_LIST: Mapping[str, Any] = {"action": "append", "default": []}
# Pictures that are attended to, as `argparse` takes it.
IMAGE_PROMPT_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--image-prompt": {
            **_LIST,
            "dest": "image_prompts",
            "metavar": "PICTURE[:SCALE]",
            "help": "a picture as a prompt beside the text, or a folder of pictures that are seen "
            "as one; may be given several times; see docs/image-prompts.md",
        },
        "--ip-adapter": {
            **_LIST,
            "dest": "ip_adapters",
            "metavar": "FILE",
            "help": "the IP-Adapter that sees --image-prompt, for all or for each",
        },
        "--image-encoder": {
            **_LIST,
            "dest": "image_encoders",
            "metavar": "FOLDER",
            "help": "CLIP's image encoder of --ip-adapter, for all or for each (default: "
            "image_encoder/ beside the file)",
        },
        "--image-prompt-mask": {
            **_LIST,
            "dest": "image_prompt_masks",
            "metavar": "MASK",
            "help": f"white where --image-prompt counts, or {NO_MASK}, for all or for each",
        },
    }
)
IMAGE_PROMPT_FIELDS = ("image_prompts", "ip_adapters", "image_encoders", "image_prompt_masks")


def ip_adapter_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Pipeline.load` takes of IP-Adapters, which are named by their files.

    Raises RequestError where image encoders do not belong to them.
    """
    files = options.ip_adapters
    if not files:
        return {}
    folders = _for_each("--image-encoder", options.image_encoders, "--ip-adapter", len(files))
    return {
        "ip_adapters": {file: Path(file) for file in files},
        "image_encoder": dict(zip(files, map(Path, folders), strict=True)) if folders else None,
    }


def image_prompts_of(options: argparse.Namespace) -> list[ImagePrompt]:
    """Make the image prompts; reads the pictures. Raises RequestError where one lacks a thing."""
    given, adapters = options.image_prompts, options.ip_adapters
    for name in () if given else IMAGE_PROMPT_FIELDS[1:]:
        if getattr(options, name):
            option = next(o for o, each in IMAGE_PROMPT_OPTIONS.items() if each["dest"] == name)
            raise RequestError(f"{option} came without --image-prompt; give the picture")
    if given and not adapters:
        raise RequestError("--image-prompt came without --ip-adapter; give its file")
    names = _for_each("--ip-adapter", adapters, "--image-prompt", len(given))
    masks = _for_each(
        "--image-prompt-mask", options.image_prompt_masks, "--image-prompt", len(given)
    )
    opened: dict[Path, Image.Image] = {}

    def picture(path: Path) -> Image.Image:
        if path not in opened:
            opened[path] = open_image(path)
        return opened[path]

    prompts = []
    for place, text in enumerate(given):
        name, scales, start, end = parse_image_prompt(text)
        mask = masks[place] if masks else NO_MASK
        prompts.append(
            ImagePrompt(
                image=[picture(path) for path in _pictures(Path(name))],
                adapter=names[place],
                scale=scales,
                start=start,
                end=end,
                mask=None if mask == NO_MASK else picture(Path(mask)),
            )
        )
    return prompts


def _for_each(option: str, values: list[str], of: str, count: int) -> list[str]:
    """Return a value for each of so many; none if none came. Raises RequestError."""
    if len(values) == 1:
        return values * count
    if len(values) not in (0, count):
        raise RequestError(
            f"{option} came {len(values)} times for {count} of {of}; give one for all, or one for "
            "each"
        )
    return values


def _pictures(path: Path) -> list[Path]:
    """Return a picture, or those of a folder in the order of their names. Raises RequestError."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in FORMATS)
    if not found:
        raise RequestError(f"the folder {path} holds no picture; give PNG, JPEG or WebP files")
    return found
