"""The options of `python -m runtime`: what they are called, and the request they make.

Options bear the names of the fields of `Request` wherever they are these, so that the settings in
a picture's file are options too.
"""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from engine.backends.registry import BACKENDS
from engine.backends.settings import DEVICES, BackendSettings, ComputePrecision
from engine.command_line import CommandParser
from engine.errors import RequestError
from runtime.checks import FOREIGN_NAMES, check_without
from runtime.drawing_options import DRAWING_OPTIONS
from runtime.image_options import IMAGE_OPTIONS
from runtime.images.canvas import ALPHA
from runtime.images.files import Sign, open_image
from runtime.images.upscaling import Hires
from runtime.images.watermark import check_watermark
from runtime.output_options import OUTPUT_OPTIONS, UPSAMPLING
from runtime.presets import describe_presets
from runtime.regions import parse_region
from runtime.request import OF_AN_IMAGE, Request
from runtime.samplers.noise_schedule import PREDICTION_TYPES
from runtime.steering_options import (
    STEERING_FIELDS,
    STEERING_OPTIONS,
    steering_arguments,
    steering_of,
)
from runtime.text_options import TEXT_OPTIONS

__all__ = [
    *("AGAIN", "FIELDS", "HIRES", "MADE_WITH"),
    *("add_engine_options", "add_request_options", "backend_settings", "hires_fields"),
    *("load_arguments", "make_parser", "make_request", "marking", "read_pictures"),
]

# What makes a picture again beside the request, by the options' names.
_FILES = ("model", "vae", "loras", "lora_dir", "embeddings")
MADE_WITH = (*_FILES, "prediction_type", "backend", "device", "precision")
PIECES = ("unet", "text_encoder", "text_encoder_2")  # and these where they were given
HIRES = {f"hires_{f.name}": f.name for f in fields(Hires)}
FIELDS = tuple(f.name for f in fields(Request) if f.init)
OF_RESULTS = ("upscale", *UPSAMPLING, "watermark", "batch_size")
_BACKEND = tuple(field.name for field in fields(BackendSettings))  # the options that settle it
_LOADED = ("vae", *PIECES, *_FILES[2:], "wildcard_dir", "strict", "prediction_type", "graphs")
AGAIN = {*MADE_WITH, *PIECES, *STEERING_FIELDS, *OF_RESULTS, *HIRES, *FIELDS}  # and nothing else


# What other programs' command lines call options that have none of the fields' foreign names.
FOREIGN_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        **FOREIGN_NAMES,
        **dict.fromkeys(("ckpt", "ckpt_path", "checkpoint", "model_path", "pretrained"), "model"),
        **dict.fromkeys(("output", "outdir", "outfile", "save_path"), "out"),
        **{"w": "width", "W": "width", "h": "height", "H": "height", "p": "prompt"},
        **{"init_img": "image", "i": "image", "mask_img": "mask", "n_samples": FOREIGN_NAMES["n"]},
        **{"sampling_method": "sampler", "scheduler": "schedule", "schedule_type": "schedule"},
        **{"lora_path": "loras", "lora_model_dir": "lora_dir", "embd_dir": "embeddings"},
        **{"controlnet": "controls", "control_net": "controls", "denoising": "strength"},
    }
)


class _Parser(CommandParser):
    """A parser that describes the presets when it is asked for help, and not before."""

    def format_help(self) -> str:
        """Return the help with the presets and an example below it."""
        self.epilog = (
            f"presets:\n{describe_presets()}\n\n"
            f'example: {self.prog} "a red apple, fluent style" --seed 7 --out apple.png'
        )
        return super().format_help()


def make_parser(prog: str) -> CommandParser:
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


def add_request_options(parser: CommandParser) -> None:
    """Add what says with what and how pictures are drawn, all but the prompt."""
    parser.foreign = FOREIGN_OPTIONS
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
    images = parser.add_argument_group("pictures to start from")
    for name, option in IMAGE_OPTIONS.items():
        images.add_argument(name, **option)
    steering = parser.add_argument_group("pictures that steer")
    for name, option in STEERING_OPTIONS.items():
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


def backend_settings(options: argparse.Namespace) -> BackendSettings:
    """Return the settings of the backend that the options of the engines give."""
    return BackendSettings(**{name: getattr(options, name) for name in _BACKEND})


def marking(options: argparse.Namespace) -> Sign | None:
    """Return what signs files, if they are to be signed; checks a watermark's text too.

    Raises RequestError for what no file could be signed or watermarked with, and as
    `Credentials.check` does.
    """
    if options.watermark is not None:
        check_watermark(options.watermark)
    if not options.c2pa_cert and not options.c2pa_key:
        return None
    if not options.c2pa_cert or not options.c2pa_key:
        raise RequestError(
            "--c2pa-cert and --c2pa-key belong together; give the certificate and its private key"
        )
    from runtime.images.credentials import Credentials

    credentials = Credentials.read(options.c2pa_cert, options.c2pa_key)
    credentials.check()
    return credentials.sign


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Pipeline.load` takes beside the model, as all commands that draw are told."""
    named = {name: getattr(options, name) for name in (*_LOADED, "precision")}
    steered = any(getattr(options, name) for name in STEERING_FIELDS)
    steering = steering_arguments(options) if steered else {}
    return {**named, **steering, "settings": backend_settings(options)}


def read_pictures(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request that options give as files, which are read here.

    Raises RequestError.
    """
    steered = any(getattr(options, name) for name in STEERING_FIELDS)
    steering = steering_of(options) if steered else {"controls": (), "image_prompts": ()}
    by_alpha = options.mask == Path(ALPHA)
    return {
        "image": options.image and open_image(options.image),
        "mask": ALPHA if by_alpha else options.mask and open_image(options.mask),
        "regions": tuple(parse_region(*pair) for pair in options.regions),
        **steering,
    }


def hires_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Hires` that options give."""
    given = {field: getattr(options, name) for name, field in HIRES.items()}
    return {field: value for field, value in given.items() if value is not None}


def make_request(options: argparse.Namespace, pictures: Mapping[str, Any] | None = None) -> Request:
    """Make the request that options ask for.

    pictures: what `read_pictures` gives for these options; None reads it
    Raises RequestError, also for an option without what it is for.
    """
    if not options.image:
        check_without("image", OF_AN_IMAGE, options)  # before a mask is read
    if options.hires_scale is None:
        check_without("hires", dict.fromkeys(HIRES), options)
    given = {name: getattr(options, name) for name in FIELDS}
    given |= read_pictures(options) if pictures is None else pictures
    if options.hires_scale is not None:
        given["hires"] = Hires(**hires_fields(options))
    return Request(**given)
