"""Text-to-image latent diffusion without torch: `Pipeline.load("pictogram")("a red apple")`."""

from runtime.denoising.denoiser import Progress
from runtime.pipeline import Pipeline, Result
from runtime.plan import Plan
from runtime.request import Hires, Request

__all__ = ["Hires", "Pipeline", "Plan", "Progress", "Request", "Result"]
