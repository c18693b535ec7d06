"""Settings read back from a picture's file: what a stranger's file holds may be anything.

No path of a file is followed: a model, an adapter or a picture is looked for by its name, in the
working folder, beside the picture and where adapters are kept.
"""

import argparse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from engine.adapters.choice import parse_adapter
from engine.adapters.textual_inversion import parse_embedding
from engine.errors import ModelError, RequestError
from engine.model import find_model, shipped_models
from engine.shipped import shipped_controls
from engine.store.cache import fingerprint
from runtime.control import parse_control
from runtime.image_prompt import NO_MASK, parse_image_prompt
from runtime.images.canvas import ALPHA
from runtime.images.files import read_settings
from runtime.images.upscaling import PIXELS, UPSCALERS, parse_upscaler
from runtime.regions import split_region
from runtime.request import MASKED, MAX_CLIP_SKIP

__all__ = ["AXES", "FILES", "parted", "settings_of"]

# The options that name files, and what a sentence calls them.
FILES = {
    "model": ("--model", "model"),
    "unet": ("--unet", "UNet"),
    "text_encoder": ("--text-encoder", "text encoder"),
    "text_encoder_2": ("--text-encoder-2", "second text encoder"),
    "vae": ("--vae", "autoencoder"),
    "loras": ("--lora", "adapter"),
    "lora_dir": ("--lora-dir", "folder of adapters"),
    "embeddings": ("--embedding", "textual inversion"),
    "controls": ("--control", "ControlNet"),
    "control_images": ("--control-image", "control picture"),
    "control_preprocessors": ("--preprocessor", "preprocessor"),
    "image_prompts": ("--image-prompt", "image prompt"),
    "ip_adapters": ("--ip-adapter", "IP-Adapter"),
    "image_encoders": ("--image-encoder", "image encoder"),
    "image_prompt_masks": ("--image-prompt-mask", "mask of an image prompt"),
    "image": ("--image", "picture"),
    "mask": ("--mask", "mask"),
    "upscale": ("--upscale", "upscaler"),
    "regions": ("--region", "mask of a region"),
    "wildcard_dir": ("--wildcard-dir", "folder of wildcards"),
}
AXES = ("x", "y", "z")  # the options of a sheet, of which it has the first
UPSCALER_FILES = ("", ".pth", ".safetensors", ".pt")  # as in runtime.upscaler_folder
CHECKPOINTS = ("", ".safetensors", ".ckpt")
ONNX = ".onnx"
BARE = ("model", "loras", "controls")  # a server's names have no endings


def settings_of(
    path: Path,
    actions: Iterable[argparse.Action],
    given: Collection[str] = (),
    folders: Sequence[Path] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Return what a picture was made with, for these options, by their names; and notes on it.

    given: names of options that the user gives himself, which are not looked at
    folders: where files are looked for beside the working folder and the picture's
    Raises RequestError when the picture does not say, says what an option cannot be, or needs a
    file that is not there.
    """
    settings = read_settings(path)
    if not settings:
        raise RequestError(
            f"{path} does not say what it was made with; give a PNG, JPEG or WebP of this program, "
            "or of Automatic1111, Forge, ComfyUI, InvokeAI, Fooocus or stable-diffusion.cpp"
        )
    actions, found = list(actions), dict[str, Any]()
    if AXES[0] in settings and AXES[0] not in [action.dest for action in actions]:
        raise RequestError(
            f"{path} is a sheet of pictures; `latentrt grid --again {path}` draws it again"
        )
    hires = settings.get("hires")
    if isinstance(hires, dict):
        settings = {**settings, **{f"hires_{name}": value for name, value in hires.items()}}
    for action in actions:
        value = settings.get(action.dest)
        if value is None or action.dest in given:
            continue
        if not _fits(action, value):
            raise RequestError(
                f"{path} says that {action.dest} is {value!r}, which it cannot be; make the "
                "picture anew from its prompt"
            )
        found[action.dest] = value
    _require_pictures({*found, *given}, path, settings)
    places = [Path(), path.parent, *folders]
    _find_axes(found, path, places)
    if found.get("clip_skip", 1) > MAX_CLIP_SKIP:
        settings = {**settings, "left_out": {**_left(settings), "Clip skip": found["clip_skip"]}}
        found["clip_skip"] = MAX_CLIP_SKIP
    notes = [
        *_find_files(found, path, settings, places),
        *_find_names(found, path, settings, given, places),
        *_left_out(found, path, settings, places),
    ]
    return found, notes


def _require_pictures(known: Collection[str], path: Path, settings: Mapping[str, Any]) -> None:
    """Raise RequestError for what another program drew from a picture, which it does not hold."""
    # Ours name their mask, and say how it is blurred where there is none, too.
    painted = settings.get("inpaint_area") == MASKED
    painted |= "mask_blur" in settings and "latentrt" not in settings
    needed = {
        "--image": settings.get("strength") is not None and "image" not in known,
        "--mask": painted and "mask" not in known,
    }
    if missing := [option for option, is_missing in needed.items() if is_missing]:
        raise RequestError(
            f"{path} was drawn from a picture that it does not hold; give {' and '.join(missing)}"
        )


def _find_files(
    found: dict[str, Any], path: Path, settings: Mapping[str, Any], places: list[Path]
) -> Iterator[str]:
    """Put the places of files for their names; notes those that have changed.

    Raises RequestError for one that is gone.
    """
    hashes = settings.get("hashes")
    for name, (option, noun) in FILES.items():
        value = found.get(name)
        if value is None or (name == "mask" and value == ALPHA):
            continue
        several = isinstance(value, list)
        paths = list[Any]()
        for each in value if several else [value]:
            if _is_no_file(name, each):
                paths.append(each)
                continue
            file, weight = parted(name, each)
            endings = CHECKPOINTS if name in BARE else [""]
            shipped = _shipped(name, file)
            place = shipped or _find(file, places, endings)
            if place is None:
                raise RequestError(
                    f"{path} was drawn with the {noun} {_base(file)}, which is neither in the "
                    f"working folder nor beside the picture; give it with {option}"
                )
            found_here = f"{file if shipped else place}{weight}"
            paths.append([found_here, each[1]] if name == "regions" else found_here)
            known = hashes.get(_base(file)) if isinstance(hashes, dict) else None
            if known is not None and known != _hash(place):
                yield f"{place} is another {noun} than {path} was drawn with"
        found[name] = paths if several else paths[0]


def _shipped(name: str, file: str) -> Path | None:
    """Return the place of what an option names and the package has, None for all else."""
    if name == "model" and file in shipped_models():
        return find_model(file)
    return shipped_controls().get(file) if name == "controls" else None


def _is_no_file(name: str, said: str) -> bool:
    """Tell whether what an option says is a word of its own in the place of a file."""
    if name == "control_preprocessors":
        return not said.lower().endswith(ONNX)
    return (name, said) == ("image_prompt_masks", NO_MASK)


def _find_axes(found: dict[str, Any], path: Path, places: list[Path]) -> None:
    """Put the places of the files of a sheet's axes for their names. Raises RequestError."""

    def place_of(name: str) -> str:
        if (place := _find(name, places, UPSCALER_FILES)) is None:
            raise RequestError(
                f"{path} was drawn with the upscaler {_base(name)}, which is neither in the "
                "working folder nor beside the picture; give the axis anew"
            )
        return str(place)

    from runtime.axes import read_axis  # which a prompt alone does not need

    for name in AXES:
        if name in found:
            found[name] = read_axis(found[name]).with_files(place_of).text


def _find_names(
    found: dict[str, Any],
    path: Path,
    settings: Mapping[str, Any],
    given: Collection[str],
    places: list[Path],
) -> Iterator[str]:
    """Look for the model and the autoencoder that another program names; notes what is not here."""
    for name, (option, noun) in (("model", FILES["model"]), ("vae", FILES["vae"])):
        wanted = settings.get(f"{name}_name")
        if not isinstance(wanted, str) or name in given or name in found:
            continue
        if (place := _find(wanted, places, CHECKPOINTS)) is not None:
            found[name] = str(place)
            continue
        if name == "model" and wanted in shipped_models():
            found[name] = wanted
            continue
        instead = "pictogram draws, the model that ships" if name == "model" else "the model's own"
        yield (
            f"{path} was drawn with the {noun} {wanted!r}, which is not here; {instead}, unless it "
            f"is given with {option}"
        )


def _left_out(
    found: dict[str, Any], path: Path, settings: Mapping[str, Any], places: list[Path]
) -> Iterator[str]:
    """Note what a picture was made with beside these settings."""
    upscaler = found.get("hires_upscaler")
    if upscaler is not None and upscaler not in UPSCALERS:
        place = _find(upscaler, places, UPSCALER_FILES)
        found["hires_upscaler"] = PIXELS if place is None else str(place)
        known = settings.get("hashes")
        if place is None:
            yield f"the upscaler {upscaler!r} of {path} is not here; {PIXELS} enlarges"
        elif isinstance(known, dict) and known.get(_base(upscaler)) not in (None, _hash(place)):
            yield f"{place} is another upscaler than {path} was drawn with"
    if left := _left(settings):
        named = ", ".join(f"{name} ({value})" for name, value in left.items())
        yield f"left out of what {path} was made with: {named[:1000]}"


def _left(settings: Mapping[str, Any]) -> dict[str, Any]:
    left = settings.get("left_out")
    return left if isinstance(left, dict) else {}


def _find(name: str, places: Iterable[Path], endings: Sequence[str]) -> Path | None:
    """Return the file or folder of a name, or with one of the endings, in the first place."""
    base = _base(name)
    if not base or base == "..":
        return None
    for place in places:
        for ending in endings:
            try:
                if (found := place / f"{base}{ending}").exists():
                    return found
            except (OSError, ValueError):
                return None
    return None


def _base(name: str) -> str:
    """Return the last part of a path of any system."""
    return PureWindowsPath(PurePosixPath(name).name).name


def parted(name: str, said: str | Path | Sequence[str]) -> tuple[str, str]:
    """Part a file from what an option says behind it: ":0.8", ":0.8@0:0.5", "=WORD".

    said: of a region both texts of its option, the mask's first
    """
    text = str(said) if isinstance(said, str | Path) else said[0]
    file = text
    if name == "loras":
        with suppress(ModelError):
            file = str(parse_adapter(text).path)
    elif name == "controls":
        with suppress(RequestError):
            file = parse_control(text)[0]
    elif name == "image_prompts":
        with suppress(RequestError):
            file = parse_image_prompt(text)[0]
    elif name == "embeddings":
        file = str(parse_embedding(text)[0])
    elif name == "upscale":
        file = str(parse_upscaler(text).path)
    elif name == "regions":
        file, _ = split_region(text)
    return file, text[len(file) :]


def _hash(path: Path) -> str | None:
    try:
        return fingerprint(path)
    except OSError:
        return None


def _fits(action: argparse.Action, value: object) -> bool:
    """Tell whether a value from a file is of the kind that an option reads from its text."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    if isinstance(action.default, list):
        items = value if isinstance(value, list) else [None]
        if action.nargs is not None:
            pairs = [item if isinstance(item, list) else [None] for item in items]
            if any(len(pair) != action.nargs for pair in pairs):
                return False
            items = [text for pair in pairs for text in pair]
        return all(isinstance(item, str) for item in items)
    if action.type in (None, Path):
        return isinstance(value, str) and (not action.choices or value in action.choices)
    numbers = value if isinstance(value, list) and action.type not in (int, float) else [value]
    return all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
