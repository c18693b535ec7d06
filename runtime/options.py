"""The options of `python -m runtime`: what they are called, and the request they make.

Options bear the names of the fields of `Request` wherever they are these, so that the settings in
a picture's file are options too.
"""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from engine.backends.registry import BACKENDS
from engine.backends.settings import DEVICES, BackendSettings, ComputePrecision
from engine.command_line import CommandParser
from runtime.control_options import CONTROL_FIELDS, CONTROL_OPTIONS, control_files
from runtime.drawing_options import DRAWING_OPTIONS
from runtime.images.canvas import ALPHA, BLUR
from runtime.images.upscaling import HIRES_STRENGTH, MODES, PIXELS, Hires
from runtime.output_options import OUTPUT_OPTIONS
from runtime.plan import PAINTED_STRENGTH, STRENGTH
from runtime.presets import describe_presets
from runtime.request import AREAS, PADDING, WHOLE, Request
from runtime.samplers.noise_schedule import PREDICTION_TYPES
from runtime.text_options import TEXT_OPTIONS, read_numbers

__all__ = [
    *("AGAIN", "FIELDS", "HIRES", "MADE_WITH"),
    *("add_engine_options", "add_request_options", "backend_settings", "load_arguments"),
    "make_parser",
]

# What makes a picture again beside the request, by the options' names.
_FILES = ("model", "vae", "loras", "lora_dir", "embeddings")
MADE_WITH = (*_FILES, "prediction_type", "backend", "device", "precision")
PIECES = ("unet", "text_encoder", "text_encoder_2")  # and these where they were given
HIRES = {f"hires_{f.name}": f.name for f in fields(Hires)}
FIELDS = tuple(f.name for f in fields(Request) if f.init)
OF_RESULTS = ("upscale", "watermark", "batch_size")
_BACKEND = tuple(field.name for field in fields(BackendSettings))  # the options that settle it
_LOADED = ("vae", *PIECES, *_FILES[2:], "wildcard_dir", "strict", "prediction_type", "graphs")
AGAIN = {*MADE_WITH, *PIECES, *CONTROL_FIELDS, *OF_RESULTS, *HIRES, *FIELDS}  # and nothing else


class _Parser(CommandParser):
    """A parser that describes the presets when it is asked for help, and not before."""

    def format_help(self) -> str:
        """Return the help with the presets and an example below it."""
        self.epilog = (
            f"presets:\n{describe_presets()}\n\n"
            f'example: {self.prog} "a red apple, fluent style" --seed 7 --out apple.png'
        )
        return super().format_help()


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of all options; prog: what the usage calls the command."""
    parser = _Parser(
        prog=prog,
        description="Draw a picture from a text, with a latent-diffusion model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(hires=None)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what to draw")
    add("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    add(
        "--expand",
        type=Path,
        metavar="FOLDER",
        help="a GPT-2 that makes the prompt longer; see docs/expansion.md",
    )
    add_request_options(parser)
    written = parser.add_argument_group("what is written")
    for flags, settings in OUTPUT_OPTIONS:
        written.add_argument(*flags, **settings)
    return parser


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add what says with what and how pictures are drawn, all but the prompt."""
    _add_model(parser.add_argument_group("the model"))
    drawing = parser.add_argument_group("how it is drawn")
    for flags, option in DRAWING_OPTIONS:
        drawing.add_argument(*flags, **option)
    text = parser.add_argument_group("the text and its guidance")
    text.add_argument(
        "--region",
        dest="regions",
        action="append",
        nargs=2,
        default=[],
        metavar=("MASK[:WEIGHT]", "TEXT"),
        help="an area that has a text of its own, where MASK is white; may be given several times",
    )
    for name, option in TEXT_OPTIONS.items():
        text.add_argument(name, **option)
    _add_images(parser.add_argument_group("pictures to start from"))
    steering = parser.add_argument_group("pictures that steer")
    for name, option in CONTROL_OPTIONS.items():
        steering.add_argument(name, **option)


def _add_model(group: Any) -> None:
    add = group.add_argument
    add(
        "-m",
        "--model",
        default="pictogram",
        help="a model that ships, by its name, a folder in diffusers' layout, or a .safetensors or "
        ".ckpt file (default: %(default)s)",
    )
    add(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="an adapter (LoRA, LoCon, LoHa, LoKr) to add; may be given several times",
    )
    add(
        "--lora-dir",
        type=Path,
        metavar="FOLDER",
        help="whose adapters a prompt may name, as <lora:NAME:WEIGHT>",
    )
    add(
        "--wildcard-dir",
        type=Path,
        metavar="FOLDER",
        help="of text files; __NAME__ in a prompt is a line of NAME.txt, chosen by the seed",
    )
    add(
        "--embedding",
        dest="embeddings",
        action="append",
        default=[],
        metavar="FILE[=WORD]",
        help="a textual inversion, which its file's name or WORD means; may be given several times",
    )
    add("--strict", action="store_true", help="refuse adapters of which a module does not fit")
    for name in ("vae", *PIECES):
        add(f"--{name.replace('_', '-')}", type=Path, metavar="FILE", help="another, or a folder")
    add(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model was trained to predict, where its file does not tell",
    )
    add_engine_options(group)


def add_engine_options(group: Any) -> None:
    """Add what chooses how engines run, whatever draws with them."""
    add = group.add_argument
    add("--graphs", type=Path, metavar="FOLDER", help="graphs that `python -m export` wrote")
    add(
        "--backend",
        choices=tuple(BACKENDS),
        help="what runs the engines: cpu is ONNX Runtime; on an NVIDIA GPU tensorrt, tensorrt_rtx, "
        "or cuda, which is ONNX Runtime there, on any GPU webgpu, which no card has run yet "
        "(default: what is fastest on the processor)",
    )
    add("--device", choices=tuple(DEVICES), help="of openvino; only CPU has been run (default)")
    add(
        "--build-missing",
        action="store_true",
        help="build the engines of tensorrt or tensorrt_rtx that the cache lacks",
    )
    add(
        "--precision",
        choices=get_args(ComputePrecision),
        help="what the engines compute in; int8 wants `python -m runtime.calibration MODEL` first "
        "(default: what is fastest here)",
    )
    add("--threads", type=int, metavar="N", help="processor threads (default: one for each core)")


def _add_images(group: Any) -> None:
    add = group.add_argument
    add("--image", type=Path, metavar="FILE", help="a picture to start from (image-to-image)")
    add(
        "--strength",
        type=float,
        metavar="X",
        help=f"how far to go from --image, above 0 and up to 1 (default: {STRENGTH}; "
        f"{PAINTED_STRENGTH:.0f} where something is painted anew)",
    )
    add(
        "--image-noise",
        metavar="KIND:AMOUNT",
        help="noise that --image gets first: gaussian:VARIANCE or salt-pepper:SHARE, 0 to 1",
    )
    add(
        "--image-guidance-scale",
        type=float,
        metavar="S",
        help="how closely a model that edits keeps to --image, 1 or more (default: 1.5)",
    )
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help=f"a picture that is white where to paint anew, or {ALPHA} for where --image is "
        "transparent",
    )
    add(
        "--inpaint-area",
        choices=AREAS,
        default=WHOLE,
        help="what is drawn: the whole image, or only what is masked, enlarged to --height and "
        "--width and laid back (default: %(default)s)",
    )
    add(
        "--mask-padding",
        type=int,
        default=PADDING,
        metavar="PIXELS",
        help="around what is masked, which that draws too (default: %(default)s)",
    )
    add(
        "--mask-blur",
        type=float,
        default=BLUR,
        metavar="PIXELS",
        help="over which the new fades into the old (default: %(default)s)",
    )
    add(
        "--no-paste-back",
        dest="paste_back",
        action="store_false",
        help="hand out what the model made outside the mask too, not the image's own pixels",
    )
    add(
        "--extend",
        type=partial(read_numbers, int, ",", 4),
        metavar="L,T,R,B",
        help="pixels to paint beyond --image: left, top, right, bottom",
    )
    add(
        "--hires",
        dest="hires_scale",
        type=float,
        metavar="SCALE",
        help="draw, enlarge so many times, and draw over it",
    )
    add("--hires-strength", type=float, metavar="X", help=f"(default: {HIRES_STRENGTH})")
    add(
        "--hires-steps",
        dest="hires_num_inference_steps",
        type=int,
        metavar="N",
        help="(default: --steps)",
    )
    add(
        "--hires-upscaler",
        metavar="NAME",
        help=f"of the pixels (lanczos, or an upscaler's file) or of the latents "
        f"({', '.join(MODES.values())}; default: {PIXELS})",
    )


def backend_settings(options: argparse.Namespace) -> BackendSettings:
    """Return the settings of the backend that the options of the engines give."""
    return BackendSettings(**{name: getattr(options, name) for name in _BACKEND})


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Pipeline.load` takes beside the model, as all commands that draw are told."""
    named = {name: getattr(options, name) for name in (*_LOADED, "precision")}
    controls = control_files(options) if options.controls else None
    return {**named, "controls": controls, "settings": backend_settings(options)}
