"""The names that `from runtime import …` finds."""

from runtime.control import Control
from runtime.denoising.latents import Progress, State
from runtime.image_prompt import ImagePrompt
from runtime.images.upscaling import Hires
from runtime.pipeline import Pipeline
from runtime.plan import Plan, StepInputs
from runtime.regions import Region
from runtime.request import Request
from runtime.result import DrawnImage, Result

__all__ = [
    "Control",
    "DrawnImage",
    "Hires",
    "ImagePrompt",
    "Pipeline",
    "Plan",
    "Progress",
    "Region",
    "Request",
    "Result",
    "State",
    "StepInputs",
]
