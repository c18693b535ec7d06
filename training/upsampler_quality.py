"""Is a larger picture more like the original? Lanczos, one pass and diffusion beside each other.

The low pictures are of subjects that no network saw. PSNR says how near the pixels are, and
MobileNet-v2 (`training.mobilenet`), which nothing was trained on, how the pictures look: the mean
distance of what it sees in a picture and in its original, and the Fréchet distance between all
pictures' and all originals' means of what it sees.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.configs.upsampler import UpsamplerConfig
from engine.configs.upscalers import CompactConfig
from engine.errors import RequestError
from runtime.images.upsampling import Sampling
from runtime.images.upscaler import Upscaler
from training.autoencoder import psnr
from training.judge import frechet_distance
from training.mobilenet import SIDE, MobileNet
from training.perceptual import mean_distance
from training.upsampler import enlarge, made_low
from training.upsampler_networks import one_pass_products

BATCH = 32

Enlarge = Callable[[np.ndarray], np.ndarray]


def evaluate(
    upsampler: Path,
    one_pass: Path,
    originals: np.ndarray,
    judge: MobileNet,
    *,
    sampling: Sampling,
    threads: int | None = None,
    progress: Callable[[Sequence[np.ndarray], str], Any] = lambda each, name: each,
) -> dict[str, Any]:
    """Enlarge the low pictures of originals (n, H, W, 3) uint8 by each; return the figures.

    upsampler, one_pass: the files that `python -m training upsampler` wrote for one scale
    Raises RequestError where they are not.
    """
    settings = BackendSettings(backend="cpu", threads=threads)
    diffusion = Upscaler.load(upsampler, settings=settings, sampling=sampling)
    network = Upscaler.load(one_pass, settings=settings)
    scale = diffusion.scale
    if network.scale != scale:
        raise RequestError(
            f"{one_pass} enlarges {network.scale} times and {upsampler} {scale} times; give two "
            "files of one scale"
        )
    low = [made_low(each, scale) for each in originals]
    methods: Mapping[str, Enlarge] = {
        "lanczos": lambda each: enlarge(each, scale),
        "one_pass": _by(network),
        "diffusion": _by(diffusion),
    }
    wanted = features(judge, originals)
    report: dict[str, Any] = {}
    for name, method in methods.items():
        start = time.perf_counter()
        found = np.stack([method(each) for each in progress(low, name)])
        seconds = (time.perf_counter() - start) / len(low)
        report[name] = {
            "psnr": psnr(originals, found),
            "feature_distance": mean_distance(judge, _middle(found), _middle(originals)),
            "frechet": frechet_distance(features(judge, found), wanted),
            "seconds": seconds,
        }
    grid = low[0].shape[0] * low[0].shape[1]
    report["one_pass"]["multiplications"] = grid * _products(network, 1)
    report["diffusion"]["multiplications"] = grid * _products(
        diffusion, sampling.num_inference_steps
    )
    return {
        "scale": scale,
        "pictures": len(originals),
        "steps": sampling.num_inference_steps,
        "noise_level": sampling.noise_level,
        **report,
    }


@torch.no_grad()
def features(judge: MobileNet, pictures: np.ndarray) -> np.ndarray:
    """Return the means of what the judge sees at each size, (n, F) float64."""
    pixels = torch.from_numpy(_middle(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = (judge(part) for part in pixels.split(BATCH))
    rows = [torch.cat([level.mean((2, 3)) for level in levels], dim=1) for levels in seen]
    return torch.cat(rows).double().numpy()


def _middle(pictures: np.ndarray) -> np.ndarray:
    """Cut the middle out of pictures (n, H, W, 3), as large as the judge takes it: unscaled."""
    top, left = (max(side - SIDE, 0) // 2 for side in pictures.shape[1:3])
    return np.ascontiguousarray(pictures[:, top : top + SIDE, left : left + SIDE])


def _by(upscaler: Upscaler) -> Enlarge:
    return lambda low: np.asarray(upscaler(Image.fromarray(low)))


def _products(upscaler: Upscaler, calls: int) -> int:
    config = upscaler.file.config
    if isinstance(config, UpsamplerConfig):
        return calls * config.products()
    assert isinstance(config, CompactConfig)
    return one_pass_products(config)
