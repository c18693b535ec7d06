"""How far are the pictures of each setting from those of float32 on ONNX Runtime?

The model that ships draws twenty prompts, each setting with the same seeds. Each setting has a
bound, and a setting whose pictures are further away fails the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.distances import psnr, ssim
from benchmarks.machine import describe, summary
from engine.backends import BackendSettings
from engine.errors import LatentrtError, RequestError
from runtime import Pipeline

STYLES = ("fluent", "noto")
SUBJECTS = (
    "a red apple",
    "a sailboat",
    "a house",
    "a blue fish",
    "a cat",
    "a tree",
    "a car",
    "a sunflower",
    "a guitar",
    "an umbrella",
)
PROMPTS = tuple(f"{subject}, {style} style" for subject in SUBJECTS for style in STYLES)
STEPS, GUIDANCE_SCALE, SEED = 20, 5.0, 100
LARGEST_DB = 100.0  # what equal pictures, which are infinitely alike, count as


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A precision on a backend, and how far its pictures may be away.

    psnr_db, ssim: the least that half of the pictures must reach
    """

    precision: str
    backend: str
    psnr_db: float
    ssim: float


REFERENCE = Setting(precision="float32", backend="cpu", psnr_db=LARGEST_DB, ssim=1.0)
# float32 elsewhere sums in another order, which 20 steps leave within a few bytes of 255.
# bfloat16 has 8 bits of each number: half of the pictures stay within 48 dB here.
SETTINGS: Mapping[str, Setting] = {
    "OpenVINO float32": Setting(precision="float32", backend="openvino", psnr_db=60.0, ssim=0.999),
    "OpenVINO bfloat16": Setting(precision="bfloat16", backend="openvino", psnr_db=40.0, ssim=0.99),
}


def measure(
    pictures: int = len(PROMPTS), steps: int = STEPS, threads: int | None = None
) -> dict[str, Any]:
    """Draw with every setting and compare; raises RequestError for more pictures than prompts.

    A setting that this installation cannot open is left out with its reason. `exceeded` of the
    report names those beyond their bounds.
    """
    if not 1 <= pictures <= len(PROMPTS):
        raise RequestError(f"{pictures} pictures are asked for; give 1 to {len(PROMPTS)}")
    expected = _draw(REFERENCE, pictures, steps, threads)
    settings: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        try:
            drawn = _draw(setting, pictures, steps, threads)
        except LatentrtError as error:
            settings[name] = {"skipped": str(error)}
            continue
        settings[name] = compared(drawn, expected, setting)
    return {
        "machine": describe(),
        "request": {
            "model": "the model that ships",
            "pictures": pictures,
            "steps": steps,
            "guidance_scale": GUIDANCE_SCALE,
            "first_seed": SEED,
        },
        "settings": settings,
        "exceeded": [name for name, found in settings.items() if found.get("exceeded")],
    }


def compared(
    drawn: list[NDArray[np.uint8]], expected: list[NDArray[np.uint8]], setting: Setting
) -> dict[str, Any]:
    """Compare pictures one by one, and their medians with a setting's bounds."""
    pairs = list(zip(drawn, expected, strict=True))
    decibels = summary([min(psnr(a, b), LARGEST_DB) for a, b in pairs])
    similar = summary([ssim(a, b) for a, b in pairs])
    return {
        "psnr_db": decibels,
        "ssim": similar,
        "bound": {"psnr_db": setting.psnr_db, "ssim": setting.ssim},
        "exceeded": decibels["median"] < setting.psnr_db or similar["median"] < setting.ssim,
    }


def _draw(
    setting: Setting, pictures: int, steps: int, threads: int | None
) -> list[NDArray[np.uint8]]:
    pipeline = Pipeline.load(
        precision=setting.precision,  # type: ignore[arg-type]
        settings=BackendSettings(backend=setting.backend, threads=threads),
    )
    wishes: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    drawn = [
        pipeline(prompt, seed=SEED + number, sampler="ddim", **wishes).images[0]
        for number, prompt in enumerate(PROMPTS[:pictures])
    ]
    return [np.asarray(picture) for picture in drawn]
