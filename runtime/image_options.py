"""The options of `python -m runtime` on pictures to start from: what argparse takes of each."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime.images.canvas import ALPHA, BLUR
from runtime.images.upscaling import HIRES_STRENGTH, MODES, PIXELS
from runtime.plan import PAINTED_STRENGTH, STRENGTH
from runtime.request import AREAS, PADDING, WHOLE
from runtime.text_options import read_numbers

__all__ = ["IMAGE_OPTIONS"]

IMAGE_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--image": {
            "type": Path,
            "metavar": "FILE",
            "help": "a picture to start from (image-to-image)",
        },
        "--strength": {
            "type": float,
            "metavar": "X",
            "help": f"how far to go from --image, above 0 and up to 1 (default: {STRENGTH}; "
            f"{PAINTED_STRENGTH:.0f} where something is painted anew)",
        },
        "--image-noise": {
            "metavar": "KIND:AMOUNT",
            "help": "noise that --image gets first: gaussian:VARIANCE or salt-pepper:SHARE, 0 to 1",
        },
        "--image-guidance-scale": {
            "type": float,
            "metavar": "S",
            "help": "how closely a model that edits keeps to --image, 1 or more (default: 1.5)",
        },
        "--mask": {
            "type": Path,
            "metavar": "FILE",
            "help": f"a picture that is white where to paint anew, or {ALPHA} for where --image is "
            "transparent",
        },
        "--inpaint-area": {
            "choices": AREAS,
            "default": WHOLE,
            "help": "what is drawn: the whole image, or only what is masked, enlarged to --height "
            "and --width and laid back (default: %(default)s)",
        },
        "--mask-padding": {
            "type": int,
            "default": PADDING,
            "metavar": "PIXELS",
            "help": "around what is masked, which that draws too (default: %(default)s)",
        },
        "--mask-blur": {
            "type": float,
            "default": BLUR,
            "metavar": "PIXELS",
            "help": "over which the new fades into the old (default: %(default)s)",
        },
        "--no-paste-back": {
            "dest": "paste_back",
            "action": "store_false",
            "help": "hand out what the model made outside the mask too, not the image's own pixels",
        },
        "--extend": {
            "type": partial(read_numbers, int, ",", 4),
            "metavar": "L,T,R,B",
            "help": "pixels to paint beyond --image: left, top, right, bottom",
        },
        "--hires": {
            "dest": "hires_scale",
            "type": float,
            "metavar": "SCALE",
            "help": "draw, enlarge so many times, and draw over it",
        },
        "--hires-strength": {
            "type": float,
            "metavar": "X",
            "help": f"(default: {HIRES_STRENGTH})",
        },
        "--hires-steps": {
            "dest": "hires_num_inference_steps",
            "type": int,
            "metavar": "N",
            "help": "(default: --steps)",
        },
        "--hires-upscaler": {
            "metavar": "NAME",
            "help": f"of the pixels (lanczos, or an upscaler's file) or of the latents "
            f"({', '.join(MODES.values())}; default: {PIXELS})",
        },
        "--upscaler-dir": {
            "type": Path,
            "metavar": "FOLDER",
            "help": "of upscalers, which --hires-upscaler and --upscale may name without endings",
        },
    }
)
