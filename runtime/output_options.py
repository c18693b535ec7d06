"""The options of `python -m runtime` that say what is written, as `argparse` takes them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from engine.errors import RequestError, renamed
from runtime.images.watermark import MAX_CHARACTERS

if TYPE_CHECKING:
    from runtime.images.upsampling import Sampling


__all__ = [
    "MARKING_OPTIONS",
    "OUTPUT_OPTIONS",
    "OWN",
    "SIGNING_OPTIONS",
    "UPSAMPLING",
    "sampling_of",
]

Options: TypeAlias = tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]

# How a diffusion upsampler draws: the options' names, and the fields of `Sampling`.
UPSAMPLING: Mapping[str, str] = {
    "upsample_steps": "num_inference_steps",
    "upsample_noise": "noise_level",
    "upsample_seed": "seed",
}
OWN = "own"  # as a preview decoder: the one that comes with the model
# Of all that writes pictures.
SIGNING_OPTIONS: Options = (
    (
        ("--watermark",),
        {
            "metavar": "TEXT",
            "help": f"up to {MAX_CHARACTERS} characters, hidden in the picture's brightness",
        },
    ),
    (
        ("--c2pa-cert",),
        {"type": Path, "metavar": "PEM", "help": "sign files with this certificate with its chain"},
    ),
    (
        ("--c2pa-key",),
        {"type": Path, "metavar": "PEM", "help": "sign files with this private key"},
    ),
)
# Of every command that writes pictures.
MARKING_OPTIONS: Options = (
    (
        ("--no-mark",),
        {
            "dest": "mark",
            "action": "store_false",
            "help": "leave out that a trained model made the picture, which files say by XMP",
        },
    ),
    *SIGNING_OPTIONS,
)
OUTPUT_OPTIONS: Options = (
    (
        ("-o", "--out"),
        {
            "type": Path,
            "metavar": "FILE",
            "help": "a .png, .jpg or .webp; several pictures are numbered "
            "(default: the prompt and the seed, and a number where that file is there)",
        },
    ),
    (
        ("--again",),
        {
            "type": Path,
            "metavar": "PICTURE",
            "help": "draw what made this picture, of this program or of another that writes "
            "its settings; other options change it",
        },
    ),
    (
        ("--preview-steps",),
        {
            "metavar": "N,N",
            "help": "write the picture as it is after these steps beside each other, to "
            "OUT-steps.png",
        },
    ),
    (
        ("--preview-decoder",),
        {
            "metavar": "FILE",
            "help": "draw both with a tiny decoder, such as TAESD's: its file or folder, or "
            f"{OWN} for the model's own (default: linear, coarse and quick)",
        },
    ),
    (
        ("--animation",),
        {"type": Path, "metavar": "FILE.webp", "help": "write the denoising as an animation"},
    ),
    (
        ("--upscale", "--upsample"),
        {
            "metavar": "FILE[:FACTOR]",
            "help": "enlarge the finished picture with an upscaler (ESRGAN, Real-ESRGAN, SwinIR, "
            "or a diffusion upsampler), as many times as it does or FACTOR says",
        },
    ),
    (
        ("--upsample-steps",),
        {"type": int, "metavar": "N", "help": "calls of a diffusion upsampler (default: 4)"},
    ),
    (
        ("--upsample-noise",),
        {
            "type": int,
            "metavar": "LEVEL",
            "help": "0 to 100, noise that hides the picture's faults from it (default: 0)",
        },
    ),
    (
        ("--upsample-seed",),
        {"type": int, "metavar": "N", "help": "of its noise (default: 0)"},
    ),
    (
        ("--safety-checker",),
        {
            "type": Path,
            "metavar": "FOLDER",
            "help": "check pictures with one in diffusers' layout (default: nothing is checked)",
        },
    ),
    (
        ("--safety-action",),
        {
            "choices": ("flag", "blur", "refuse"),
            "help": "what happens to a picture that is found unsafe: said and marked in its file, "
            "also blurred, or not written (default: flag)",
        },
    ),
    *MARKING_OPTIONS,
)


def sampling_of(options: argparse.Namespace) -> "Sampling | None":
    """Return how a diffusion upsampler draws, None where no option says; raises RequestError."""
    from runtime.images.upsampling import Sampling  # which a prompt alone does not need

    given = {field: getattr(options, name) for name, field in UPSAMPLING.items()}
    asked = {field: value for field, value in given.items() if value is not None}
    try:
        return Sampling(**asked) if asked else None
    except RequestError as error:
        names = {field: name for name, field in UPSAMPLING.items()}
        raise RequestError(renamed(str(error), names)) from error
