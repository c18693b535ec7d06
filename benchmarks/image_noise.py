"""From which strength on does image-to-image remove noise from the picture it starts from?

Held-out pictures of the data set get noise, and the model that ships draws over them with their own
captions. Beside each clean picture stand the noisy one and what is drawn from it: in the curve of a
noise over the strengths the one rises above the other where the noise is removed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.held_out import read_pictograms
from benchmarks.machine import describe
from benchmarks.quality import LARGEST_DB
from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from runtime.images.files import psnr
from runtime.images.image_noise import ImageNoise, noise_seed
from runtime.noise import make_noise

NOISES = (
    None,
    *("gaussian:0.003", "gaussian:0.01", "gaussian:0.03", "gaussian:0.1"),
    *("salt-pepper:0.01", "salt-pepper:0.05", "salt-pepper:0.2"),
)
STRENGTHS = (0.15, 0.3, 0.5, 0.7, 0.9)
REMOVED_DB = 5.0  # by which a picture is nearer to the clean one for noise to count as removed
SEED = 500


def measure(data: Path, pictures: int = 48, threads: int | None = None) -> dict[str, Any]:
    """Draw over noisy held-out pictures; returns medians in dB and matches, by noise and strength.

    data: what `python -m training data` makes. Raises RequestError for a number it does not have.
    """
    from training.pictograms import STYLES, caption

    pictograms = read_pictograms(data)
    pairs = np.argwhere(pictograms.held_out)
    if not 1 <= pictures <= len(pairs):
        raise RequestError(f"{pictures} pictures are asked for; give 1 to {len(pairs)}")
    chosen = pairs[np.linspace(0, len(pairs) - 1, pictures).astype(int)]
    captions = [caption(pictograms.names[subject], STYLES[style]) for subject, style in chosen]
    originals = pictograms.images[pairs[:, 0], pairs[:, 1]]
    clean = pictograms.images[chosen[:, 0], chosen[:, 1]]
    pipeline = Pipeline.load(settings=BackendSettings(threads=threads))
    curves: dict[str, Any] = {}
    for noise in NOISES:
        start = _likeness(noisy(clean, noise), clean)
        curve = []
        for strength in STRENGTHS:
            drawn = list(_drawn(pipeline, clean, captions, noise, strength))
            left = _likeness(drawn, clean)
            curve.append(
                {
                    "strength": strength,
                    "psnr_db": round(left, 2),
                    "top_1": round(_match(np.stack(drawn), originals, chosen, pairs), 4),
                }
            )
        curves[noise or "none"] = {
            "noisy_psnr_db": None if noise is None else round(start, 2),
            "drawn": curve,
            "removed_from": removed_from(start, curve),
        }
    return {
        "machine": describe(),
        "request": {"pictures": pictures, "first_seed": SEED, "removed_db": REMOVED_DB},
        "noise": curves,
    }


def noisy(pictures: NDArray[np.uint8], noise: str | None) -> list[NDArray[np.uint8]]:
    """Return the pictures, (n, H, W, 3), as the runs start from them."""
    if noise is None:
        return list(pictures)
    read = ImageNoise.read(noise)
    return [
        read.added(picture, make_noise("cpu", noise_seed(SEED + number)).normal)
        for number, picture in enumerate(pictures)
    ]


def removed_from(noisy_db: float, curve: list[dict[str, float]]) -> float | None:
    """Return the least strength whose pictures are nearer to the clean ones by REMOVED_DB."""
    for point in curve:
        if point["psnr_db"] >= noisy_db + REMOVED_DB:
            return point["strength"]
    return None


def noise_table(measured: Mapping[str, Any]) -> str:
    """Return the figures as a table in Markdown: a row for each noise."""
    strengths = [f"{point['strength']:g}" for point in measured["noise"]["none"]["drawn"]]
    lines = [
        f"| noise | noisy picture | {' | '.join(f'strength {each}' for each in strengths)} "
        "| removed from |",
        f"|---|---|{'---|' * len(strengths)}---|",
    ]
    for name, found in measured["noise"].items():
        cells = [f"{p['psnr_db']:.1f} dB, {p['top_1']:.0%}" for p in found["drawn"]]
        start = found["noisy_psnr_db"]
        lines.append(
            f"| {name} | {'—' if start is None else f'{start:.1f} dB'} | {' | '.join(cells)} "
            f"| {found['removed_from'] or '—'} |"
        )
    return "\n".join(lines)


def _drawn(
    pipeline: Pipeline,
    clean: NDArray[np.uint8],
    captions: list[str],
    noise: str | None,
    strength: float,
) -> Iterator[NDArray[np.uint8]]:
    for number, (picture, text) in enumerate(zip(clean, captions, strict=True)):
        result = pipeline(
            text,
            image=Image.fromarray(picture),
            image_noise=noise,
            strength=strength,
            num_inference_steps=20,
            guidance_scale=5.0,
            sampler="ddim",
            seed=SEED + number,
        )
        yield np.asarray(result.images[0])


def _match(
    drawn: NDArray[np.uint8],
    originals: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    pairs: NDArray[np.int64],
) -> float:
    """Return the share of pictures that are nearest to their own original among all held out."""
    from training.quality import features

    a, b = features(drawn), features(originals)
    nearest = np.linalg.norm(a[:, None] - b[None], axis=2).argmin(axis=1)
    return float((pairs[nearest] == chosen).all(axis=1).mean())


def _likeness(pictures: list[NDArray[np.uint8]], clean: NDArray[np.uint8]) -> float:
    """Return the median PSNR of pictures beside the clean ones, in dB; equal ones count as 100."""
    pairs = zip(pictures, clean, strict=True)
    return float(np.median([min(psnr(a, b), LARGEST_DB) for a, b in pairs]))
