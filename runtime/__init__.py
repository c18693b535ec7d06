"""Text-to-image latent diffusion without torch: `Pipeline.load("pictogram")("a red apple")`."""

from runtime.pipeline import Pipeline
from runtime.plan import Plan, Progress, Result
from runtime.request import Request

__all__ = ["Pipeline", "Plan", "Progress", "Request", "Result"]
