"""Text-to-image latent diffusion without torch: `Pipeline.load("pictogram")("a red apple")`."""

import sys
from pathlib import Path

import engine

# A folder or a file of this name may stand where Python looks first, such as the working folder.
if Path(engine.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    _message = (
        f"{engine.__file__} is found in place of Latentrt's package `engine`; rename it, run the "
        "command from another folder, or use the command `latentrt`"
    )
    if sys.argv[:1] == ["-m"]:  # `python -m runtime`, which would print a traceback
        print(f"error: {_message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_message)

from runtime.denoising.latents import Progress, State
from runtime.images.upscaling import Hires
from runtime.pipeline import Pipeline
from runtime.plan import Plan, StepInputs
from runtime.regions import Region
from runtime.request import Request
from runtime.result import DrawnImage, Result

__all__ = [
    "DrawnImage",
    "Hires",
    "Pipeline",
    "Plan",
    "Progress",
    "Region",
    "Request",
    "Result",
    "State",
    "StepInputs",
]
