"""`latentrt upscale PICTURE --upscaler FILE[:FACTOR]`: enlarge a picture that is there."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.backends.settings import PRECISIONS, BackendSettings
from engine.command_line import CommandParser
from engine.errors import exit_status
from engine.store.cache import fingerprint
from runtime.images.files import (
    SOURCE_KEY,
    check_output,
    open_image,
    program_version,
    read_settings,
    read_source_type,
    write_image,
)
from runtime.images.upscaler import Upscaler
from runtime.images.upscaling import UpscalerChoice, parse_upscaler
from runtime.images.watermark import check_watermark_size, embed_watermark
from runtime.options import marking
from runtime.output_options import MARKING_OPTIONS, UPSAMPLING, sampling_of
from runtime.terminal import Loading, say, show_progress
from runtime.upscaler_folder import find_choice

ENHANCED = "algorithmicallyEnhanced"  # what a picture becomes that does not say what it is
PROCESSOR = ("cpu", "openvino")  # what an upscaler runs on


def main(arguments: Sequence[str] | None = None, prog: str = "latentrt upscale") -> int:
    """Run the command; return its exit status: 0, or 2 for a user's mistake."""
    parser = make_parser(prog)
    return exit_status(lambda: _upscale(parser.parse_args(arguments)), wording=parser.in_options)


def make_parser(prog: str) -> CommandParser:
    """Return the command's parser; prog: what the usage calls it."""
    parser = CommandParser(prog=prog, description="Enlarge a picture with a trained upscaler.")
    add = parser.add_argument
    add("picture", metavar="PICTURE", type=Path, help="a PNG, JPEG or WebP")
    add(
        "--upscaler",
        required=True,
        metavar="FILE[:FACTOR]",
        help="of ESRGAN, Real-ESRGAN, SwinIR or a diffusion upsampler, and how many times larger "
        "the sides become (default: as many as the upscaler makes them)",
    )
    add(
        "--upscaler-dir",
        type=Path,
        metavar="FOLDER",
        help="of upscalers, which --upscaler may name without endings",
    )
    add("-o", "--out", type=Path, metavar="FILE", help="(default: PICTURE-upscaled.png here)")
    add("--backend", choices=PROCESSOR, default="cpu", help="(default: %(default)s, ONNX Runtime)")
    offered = dict.fromkeys(p for name in PROCESSOR for p in PRECISIONS[name] if p != "int8")
    add("--precision", choices=tuple(offered), help="what it computes in (default: float32)")
    add("--threads", type=int, metavar="N", help="processor threads (default: one for each core)")
    diffusion = parser.add_argument_group("of a diffusion upsampler")
    diffusion.add_argument(
        "--steps", dest="upsample_steps", type=int, metavar="N", help="(default: 4)"
    )
    diffusion.add_argument(
        "--noise-level",
        dest="upsample_noise",
        type=int,
        metavar="N",
        help="0 to 100, noise that hides the picture's faults from it (default: 0)",
    )
    diffusion.add_argument(
        "--seed", dest="upsample_seed", type=int, metavar="N", help="(default: 0)"
    )
    for flags, settings in MARKING_OPTIONS:
        add(*flags, **settings)
    return parser


def _upscale(options: argparse.Namespace) -> None:
    if options.upscaler_dir:
        options.upscaler = find_choice(options.upscaler, options.upscaler_dir)
    choice = parse_upscaler(options.upscaler)
    out = options.out or Path(f"{options.picture.stem}-upscaled.png")
    check_output(out)
    sign = marking(options)
    image = open_image(options.picture)
    image.info[SOURCE_KEY] = read_source_type(options.picture) or ENHANCED
    with Loading(str(choice.path)):
        settings = BackendSettings(backend=options.backend, threads=options.threads)
        upscaler = Upscaler.load(
            choice.path,
            precision=options.precision,
            settings=settings,
            sampling=sampling_of(options),
        )
    for note in upscaler.file.notes:
        say(f"note: {note}", sys.stderr)
    if options.watermark:
        factor = choice.factor or upscaler.scale
        check_watermark_size(round(image.width * factor), round(image.height * factor))
    larger = upscaler(image, choice.factor, on_tile=partial(show_progress, noun="tile"))
    made_with = _made_with(options, choice)
    if options.watermark:
        larger = embed_watermark(larger, options.watermark)
        made_with["watermark"] = options.watermark
    replaces = options.out is not None
    written = write_image(larger, out, made_with, mark=options.mark, sign=sign, replaces=replaces)
    say(str(written), sys.stdout)


def _made_with(options: argparse.Namespace, choice: UpscalerChoice) -> dict[str, Any]:
    """Return what the picture says that it was made with, and the upscaler, by name and hash.

    One drawing enlarges once, so of a picture that was enlarged before, `--again` has to say that
    it leaves out the second time.
    """
    made_with, name = read_settings(options.picture) or {}, Path(options.upscaler).name
    hashes, left_out = (
        value if isinstance(value := made_with.get(key), dict) else {}
        for key in ("hashes", "left_out")
    )
    own = {"upscale": name, **{n: value for n in UPSAMPLING if (value := getattr(options, n))}}
    again = {"left_out": {**left_out, "upscale": name}} if "upscale" in made_with else own
    return {
        **made_with,
        **again,
        "hashes": {**hashes, choice.path.name: fingerprint(choice.path)},
        "latentrt": program_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
