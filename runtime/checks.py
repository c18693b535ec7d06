"""Checks of what a user hands over; each raises RequestError: what came, what is allowed."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from PIL import Image

from engine.errors import RequestError, choice, nearest

One = TypeVar("One")
OneOrMore: TypeAlias = One | Sequence[One]
# What other programs call a field of `Request`.
FOREIGN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("steps", "num_steps", "sampling_steps"), "num_inference_steps"),
        **dict.fromkeys(("num_images", "n", "batch_size", "n_iter"), "num_images_per_prompt"),
        **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "guidance_scale"),
        **dict.fromkeys(("mask_image", "inpaint_mask"), "mask"),
        **dict.fromkeys(("init_image", "input_image", "init_images"), "image"),
        **dict.fromkeys(("generator", "generators", "seeds"), "seed"),
        "subseed": "variation_seed",
        "subseed_strength": "variation_strength",
        **dict.fromkeys(("scheduler", "sampler_name", "sample_method"), "sampler"),
        **dict.fromkeys(("negative", "uncond", "negative_prompts"), "negative_prompt"),
        **dict.fromkeys(("prompts", "text", "texts"), "prompt"),
        **dict.fromkeys(("denoising_strength", "denoise", "image_strength"), "strength"),
        **dict.fromkeys(("enable_hr", "hires_fix", "hr_scale"), "hires"),
        "size": "height and width",
        "padding_mask_crop": "inpaint_area and mask_padding",
        "timestep_spacing": "schedule",
        "sigma_schedule": "schedule",
        "rng": "noise",
        **dict.fromkeys(("tiling", "tile", "circular"), "seamless"),
        **dict.fromkeys(("kohya_deep_shrink", "hidiffusion"), "deep_shrink"),
        "image_cfg_scale": "image_guidance_scale",
        "ip_adapter_image": "image_prompts",
        "sigmas": "schedule",
    }
)


def check_image(name: str, image: object) -> None:
    """Refuse what is no image of PIL's, and one whose file cannot be read. Raises RequestError."""
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
    """Return a list of texts; raises RequestError for all else."""
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise RequestError(
            f"{name} came as {type(values).__name__}; give a text or a list of texts"
        )
    for value in values:
        if not isinstance(value, str):
            raise RequestError(f"{name} holds a {type(value).__name__}; every prompt is a text")
    return list(values)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not one of some names; raises RequestError."""
    if value not in tuple(choices):
        raise RequestError(f"{name} is {value!r}; {choice(value, choices)}")


def check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    """Refuse what is no number of a kind, Integral or Real, from low to high: RequestError."""
    # bool counts as a number in Python, but nobody means True pixels.
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        what = "whole number" if kind is Integral else "number"
        raise RequestError(f"{name} is {value!r}; give a {what} from {low} to {high}")


def check_given(name: str, value: object, kind: type, low: float, high: float) -> None:
    """Do as `check_number` does, unless there is no value."""
    if value is not None:
        check_number(name, value, kind, low, high)


def check_scale(name: str, value: object, most: float) -> None:
    """Refuse what is neither a number from 0 to the most nor several of them: RequestError."""
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value)
    for scale in value if several else [value]:  # type: ignore[attr-defined]
        check_number(name, scale, Real, 0, most)


def check_apg(value: object) -> None:
    """Refuse what is not eta, threshold and momentum of projected guidance: RequestError."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise RequestError(
            f"apg is {value!r}; give eta, the threshold and the momentum, such as (0.0, 15.0, -0.5)"
        )
    check_number("apg's eta", value[0], Real, 0, 10)
    check_number("apg's threshold", value[1], Real, 0, 10**6)
    check_number("apg's momentum", value[2], Real, -1, 1)


def check_without(lacking: str, others: Mapping[str, object], given: object) -> None:
    """Refuse what cannot act without a field that is not given: RequestError.

    others: fields of what is given, with what they are where nobody asks for them
    """
    for name, default in others.items():
        if getattr(given, name) != default:
            raise RequestError(f"{name} came without {lacking}; give both, or leave {name} out")


def check_sides(height: int, width: int, multiple: int, most: int) -> None:
    """Refuse sides that are no multiples of a number of pixels, or too long: RequestError."""
    for name, side in (("height", height), ("width", width)):
        check_number(name, side, Integral, multiple, most)
        if side % multiple:
            raise RequestError(
                f"{name} is {side}; it must be a multiple of {multiple}, "
                f"such as {max(round(side / multiple), 1) * multiple}"
            )


def check_extend(value: object) -> None:
    """Refuse what is not four numbers, by which a canvas reaches beyond an image: RequestError."""
    if not isinstance(value, Sequence) or len(value) != 4:
        raise RequestError(
            f"extend is {value!r}; give four numbers of pixels: left, top, right, bottom"
        )


def check_interval(name: str, value: object) -> None:
    """Refuse what is no part of a run: two numbers from 0 to 1 that do not fall. RequestError."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise RequestError(f"{name} is {value!r}; give two parts of the run, such as (0.0, 0.8)")
    for end in value:
        check_number(name, end, Real, 0, 1)
    if value[0] > value[1]:
        raise RequestError(f"{name} is {value!r}; it must not end before it begins")


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that there are none of, and name the one that is meant: RequestError."""
    for name in names:
        if name not in known:
            meant = FOREIGN_NAMES.get(name) or nearest(name, known)
            raise RequestError(
                f"{name} is no option; "
                + (f"did you mean {meant}?" if meant else f"there are {', '.join(known)}")
            )


def path_of(given: str | Path | None) -> Path | None:
    """Return a path that may have come as a text."""
    return None if given is None else Path(given)


def several(given: OneOrMore[One] | None) -> Sequence[One]:
    """Return a list of what may be one alone, such as a text, or None."""
    if given is None:
        return ()
    if isinstance(given, Sequence) and not isinstance(given, str):
        return given
    return (given,)
