"""How far are the pictures of each setting from those of float32 on ONNX Runtime?

The model that ships draws twenty prompts, each setting with the same seeds, the settings in turn. A
setting is a precision on a backend, or a saving that has a price; each has a bound, and a setting
whose pictures are further away fails the run. What a saving gains is its time beside that of the
same backend and precision without it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import calibrate
from benchmarks.distances import ssim
from benchmarks.features import Distance, feature_distance
from benchmarks.held_out import held_out_match, read_pictograms
from benchmarks.machine import describe, summary
from benchmarks.scenarios import SCENARIOS
from engine.backends.settings import BackendSettings
from engine.errors import LatentrtError, RequestError
from runtime import Pipeline
from runtime.images.files import psnr

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
    """A precision on a backend, what is saved, and how far the pictures may be away.

    psnr_db, ssim: the least that half of the pictures must reach
    features: the largest `benchmarks.features` distance that half of them may have; None for any
    options: fields of `runtime.Request` that save time at a price
    """

    precision: str
    backend: str
    psnr_db: float
    ssim: float
    features: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def engines(self) -> tuple[str, str]:
        """Return what pipeline draws it: settings with equal engines share one."""
        return self.backend, self.precision


@dataclass(frozen=True, slots=True)
class Drawn:
    """A setting's pictures, (H, W, 3) of 8 bits, and the seconds that each took."""

    images: Sequence[NDArray[np.uint8]]
    seconds: Sequence[float]


REFERENCE = Setting(precision="float32", backend="cpu", psnr_db=LARGEST_DB, ssim=1.0)
REFERENCE_NAME = "ONNX Runtime float32"
# float32 elsewhere sums in another order, which 20 steps leave within a few bytes of 255.
# bfloat16 has 8 bits of each number: half of the pictures stay within 50 dB here.
# int8 has 8 bits of each number and one scale for many: half stay within 35 dB.
# Savings: deep features that are kept for one, two or three calls leave 37, 35 and 27 dB, guidance
# that ends after four fifths or half of the steps 28 and 25 dB.
SETTINGS: Mapping[str, Setting] = {
    "OpenVINO float32": Setting(
        precision="float32", backend="openvino", psnr_db=60.0, ssim=0.999, features=1e-3
    ),
    "OpenVINO bfloat16": Setting(
        precision="bfloat16", backend="openvino", psnr_db=40.0, ssim=0.99, features=0.005
    ),
    "OpenVINO int8": Setting(
        precision="int8", backend="openvino", psnr_db=32.0, ssim=0.95, features=0.1
    ),
    **{
        f"ONNX Runtime float32, {saving}": Setting(
            precision="float32",
            backend="cpu",
            psnr_db=psnr_db,
            ssim=similar,
            features=features,
            options=options,
        )
        for saving, options, psnr_db, similar, features in (
            ("cache_interval=2", {"cache_interval": 2}, 33.0, 0.95, 0.1),
            ("cache_interval=3", {"cache_interval": 3}, 27.0, 0.9, 0.2),
            ("cache_interval=4", {"cache_interval": 4}, 22.0, 0.8, 0.4),
            (
                "guided in 0% to 80% of the steps",
                {"guidance_interval": (0.0, 0.8)},
                27.0,
                0.93,
                0.1,
            ),
            (
                "guided in 0% to 50% of the steps",
                {"guidance_interval": (0.0, 0.5)},
                20.0,
                0.83,
                0.4,
            ),
        )
    },
}


def measure(
    images: int = len(PROMPTS),
    steps: int = STEPS,
    threads: int | None = None,
    match: Path | None = None,
) -> dict[str, Any]:
    """Draw with every setting and compare; raises RequestError for more pictures than prompts.

    match: the data set whose held-out pairs every setting draws too; raises RequestError
    A setting that this installation cannot open is left out with its reason. `exceeded` of the
    report names those beyond their bounds.
    """
    if not 1 <= images <= len(PROMPTS):
        raise RequestError(f"{images} pictures are asked for; give 1 to {len(PROMPTS)}")
    data = read_pictograms(match) if match else None
    settings = {REFERENCE_NAME: REFERENCE, **SETTINGS}
    pipelines, skipped = opened(settings, threads)
    drawn = draw(pipelines, settings, images, steps)
    distance = feature_distance()
    found: dict[str, dict[str, Any]] = {}
    for name, setting in settings.items():
        if name in skipped:
            found[name] = {"skipped": skipped[name]}
            continue
        base = plain(setting, settings, drawn)
        found[name] = {
            **compared(drawn[name].images, drawn[REFERENCE_NAME].images, setting, distance),
            "seconds": summary(drawn[name].seconds),
            "beside": base,
            "times_faster": faster(drawn[name].seconds, drawn[base].seconds),
        }
        if data is not None:
            found[name]["match"] = held_out_match(
                pipelines[setting.engines()], setting.options, data
            )
    reference = found.pop(REFERENCE_NAME)
    return {
        "machine": describe(),
        "request": {
            "model": "the model that ships",
            "pictures": images,
            "steps": steps,
            "guidance_scale": GUIDANCE_SCALE,
            "first_seed": SEED,
            "features": "no torch to compute them" if distance is None else "of the autoencoder",
        },
        "reference": {key: reference[key] for key in ("seconds", "match") if key in reference},
        "settings": found,
        "exceeded": [name for name, taken in found.items() if taken.get("exceeded")],
    }


def opened(
    settings: Mapping[str, Setting], threads: int | None
) -> tuple[dict[tuple[str, str], Pipeline], dict[str, str]]:
    """Open a pipeline for each pair of backend and precision; also say which could not be."""
    pipelines: dict[tuple[str, str], Pipeline] = {}
    failed: dict[tuple[str, str], str] = {}
    for backend, precision in dict.fromkeys(each.engines() for each in settings.values()):
        try:
            if precision == "int8":
                calibrate(SCENARIOS["pictogram"])
            pipeline = Pipeline.load(
                precision=precision,  # type: ignore[arg-type]
                settings=BackendSettings(backend=backend, threads=threads),
            )
            pipeline(PROMPTS[0], num_inference_steps=1, seed=SEED)  # opens and warms the engines
        except LatentrtError as error:
            failed[backend, precision] = str(error)
        else:
            pipelines[backend, precision] = pipeline
    skipped = {
        name: failed[each.engines()] for name, each in settings.items() if each.engines() in failed
    }
    return pipelines, skipped


def draw(
    pipelines: Mapping[tuple[str, str], Pipeline],
    settings: Mapping[str, Setting],
    images: int,
    steps: int,
) -> dict[str, Drawn]:
    """Draw each prompt with every setting in turn; those without a pipeline are left out."""
    able = {name: each for name, each in settings.items() if each.engines() in pipelines}
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "sampler": "ddim"}
    drawn: dict[str, Drawn] = {name: Drawn([], []) for name in able}
    for number, prompt in enumerate(PROMPTS[:images]):
        for name, setting in able.items():
            start = time.perf_counter()
            result = pipelines[setting.engines()](
                prompt, seed=SEED + number, **{**options, **setting.options}
            )
            drawn[name] = Drawn(
                [*drawn[name].images, np.asarray(result.images[0])],
                [*drawn[name].seconds, time.perf_counter() - start],
            )
    return drawn


def plain(setting: Setting, settings: Mapping[str, Setting], drawn: Mapping[str, Drawn]) -> str:
    """Return what a setting's time is told beside: the same engines without what it saves."""
    if setting.options:
        for name in drawn:
            other = settings[name]
            if other.engines() == setting.engines() and not other.options:
                return name
    return REFERENCE_NAME


def faster(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return how many times faster pictures were than the same of another setting."""
    return summary([other / own for own, other in zip(seconds, others, strict=True)])


def compared(
    drawn: Sequence[NDArray[np.uint8]],
    expected: Sequence[NDArray[np.uint8]],
    setting: Setting,
    distance: Distance | None = None,
) -> dict[str, Any]:
    """Compare images, (H, W, 3) uint8, one by one, and their medians with a setting's bounds."""
    pairs = list(zip(drawn, expected, strict=True))
    decibels = summary([min(psnr(a, b), LARGEST_DB) for a, b in pairs])
    similar = summary([ssim(a, b) for a, b in pairs])
    found: dict[str, Any] = {
        "psnr_db": decibels,
        "ssim": similar,
        "bound": {"psnr_db": setting.psnr_db, "ssim": setting.ssim},
        "exceeded": decibels["median"] < setting.psnr_db or similar["median"] < setting.ssim,
    }
    if distance is not None:
        found["features"] = summary([distance(a, b) for a, b in pairs])
        if setting.features is not None:
            found["bound"]["features"] = setting.features
            found["exceeded"] |= found["features"]["median"] > setting.features
    return found
