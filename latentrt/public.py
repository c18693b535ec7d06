"""The names that `from latentrt import …` finds."""

from engine.adapters.choice import AdapterChoice, parse_adapter
from engine.backends.settings import BackendSettings, ComputePrecision
from engine.engines import Engines
from engine.errors import (
    BackendError,
    GraphError,
    LatentrtError,
    ModelError,
    OutputError,
    RequestError,
)
from engine.model import Model, find_model, shipped_models
from runtime.calibration import calibrate
from runtime.control import Control
from runtime.denoising.latents import Progress, State
from runtime.expansion import PromptExpander
from runtime.image_prompt import ImagePrompt
from runtime.images.credentials import Credentials
from runtime.images.files import read_image, read_settings, write_image
from runtime.images.previews import Preview, probe
from runtime.images.safety import SafetyChecker, SafetyVerdict
from runtime.images.upscaler import Upscaler
from runtime.images.upscaling import UPSCALERS, Hires
from runtime.images.watermark import embed_watermark, read_watermark
from runtime.noise import NOISES
from runtime.pipeline import Pipeline
from runtime.plan import Plan, StepInputs
from runtime.preprocessors.choice import find_preprocessor, preprocess
from runtime.preprocessors.named import PREPROCESSORS
from runtime.preprocessors.onnx_file import OnnxPreprocessor
from runtime.presets import PRESETS, Preset, preset
from runtime.regions import Region
from runtime.request import Request
from runtime.request_options import CallOptions, RequestOptions
from runtime.result import ArrayResult, DrawnImage, Result
from runtime.samplers import SAMPLERS, SCHEDULES

__all__ = [
    "NOISES",
    "PREPROCESSORS",
    "PRESETS",
    "SAMPLERS",
    "SCHEDULES",
    "UPSCALERS",
    "AdapterChoice",
    "ArrayResult",
    "BackendError",
    "BackendSettings",
    "CallOptions",
    "ComputePrecision",
    "Control",
    "Credentials",
    "DrawnImage",
    "Engines",
    "GraphError",
    "Hires",
    "ImagePrompt",
    "LatentrtError",
    "Model",
    "ModelError",
    "OnnxPreprocessor",
    "OutputError",
    "Pipeline",
    "Plan",
    "Preset",
    "Preview",
    "Progress",
    "PromptExpander",
    "Region",
    "Request",
    "RequestError",
    "RequestOptions",
    "Result",
    "SafetyChecker",
    "SafetyVerdict",
    "State",
    "StepInputs",
    "Upscaler",
    "calibrate",
    "embed_watermark",
    "find_model",
    "find_preprocessor",
    "parse_adapter",
    "preprocess",
    "preset",
    "probe",
    "read_image",
    "read_settings",
    "read_watermark",
    "shipped_models",
    "write_image",
]
