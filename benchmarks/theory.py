"""The figures of docs/theory.md: noise schedules, the loss by noise level, what guidance does.

The model that ships is measured on pairs of subject and style that it was not trained on. Guidance
is measured twice: how many pictures are nearest to the original that was asked for, and how far
apart pictures of one caption are that begin from different noise.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.held_out import read_pictograms
from benchmarks.machine import describe
from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from engine.model import find_model
from runtime import Pipeline
from runtime.samplers.noise_schedule import NoiseSchedule

# By diffusers' names, with the betas of Ho et al. 2020.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "quadratic": {"beta_schedule": "scaled_linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
POINTS = 41  # of each schedule's curve
LEVELS = 11  # of noise, at which the loss is measured
LOSS_PICTURES = 48  # at most, that the loss is measured on
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
NOISES = 4  # of each caption
SEED = 900
MODEL = "pictogram"


def measure(data: Path, pictures: int = 16, threads: int | None = None) -> dict[str, Any]:
    """Return the schedules' curves, the loss by noise level, and match and diversity by scale.

    data: what `python -m training data` makes; pictures: captions that are drawn, each NOISES
    times. Raises RequestError for a number that the data set does not have.
    """
    pictograms = read_pictograms(data)
    pairs = np.argwhere(pictograms.held_out)
    if not 1 <= pictures <= len(pairs):
        raise RequestError(f"{pictures} pictures are asked for; give 1 to {len(pairs)}")
    chosen = np.linspace(0, len(pairs) - 1, pictures).astype(int)
    noised = {
        "trained": spread(np.argwhere(~pictograms.held_out)),
        "held_out": spread(pairs),
    }
    return {
        "machine": describe(),
        "request": {
            "pictures": pictures,
            "noises": NOISES,
            "first_seed": SEED,
            "steps": 20,
            "sampler": "ddim",
            "originals": len(pairs),
            "loss_pictures": {name: len(each) for name, each in noised.items()},
        },
        "schedules": schedules(),
        "loss": {name: losses(pictograms, each) for name, each in noised.items()},
        "guidance": guidance(pictograms, pairs, chosen, BackendSettings(threads=threads)),
    }


def spread(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return up to LOSS_PICTURES of the pairs, evenly from all: (n, 2) int64 -> (k, 2) int64."""
    count = min(LOSS_PICTURES, len(pairs))
    return pairs[np.linspace(0, len(pairs) - 1, count).astype(int)]


def schedules() -> dict[str, Any]:
    """Return each schedule's signal and noise scales along its timesteps, 0 to 1."""
    from training.diffusion import SCHEDULER

    found = {}
    for name, config in {MODEL: SCHEDULER, **SCHEDULES}.items():
        alphas_cumprod = NoiseSchedule.from_config(config).alphas_cumprod
        at = np.linspace(0, len(alphas_cumprod) - 1, POINTS).round().astype(int)
        signal = alphas_cumprod[at]
        found[name] = {
            "time": _rounded(at / (len(alphas_cumprod) - 1)),
            "signal": _rounded(np.sqrt(signal)),
            "noise": _rounded(np.sqrt(1 - signal)),
        }
    return found


def losses(pictograms: Any, pairs: NDArray[np.int64]) -> dict[str, Any]:
    """Return the mean squared error in v by timestep, with the captions and without.

    pairs: (n, 2) int64, subject and style of the pictures that are noised
    """
    import torch

    from export.modules.autoencoder import Autoencoder
    from runtime.conditioning.tokenizer import Tokenizer
    from training import autoencoder, ship, text_encoders
    from training.denoising_loss import squared_errors
    from training.diffusion import SCHEDULER, Denoiser
    from training.pictograms import STYLES, caption

    folder = find_model(MODEL)
    denoiser_state, autoencoder_state = ship.read_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    text = text_encoders.read_config(folder / "text_encoder" / "config.json")
    denoiser = Denoiser(tokenizer.vocab_size, text=text).eval()
    denoiser.load_state_dict(denoiser_state)
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(autoencoder_state)
    latents = autoencoder.encode(trained, pictograms.images[pairs[:, 0], pairs[:, 1]])
    texts = [caption(pictograms.names[subject], STYLES[style]) for subject, style in pairs]
    total = NoiseSchedule.from_config(SCHEDULER).num_train_timesteps
    levels = np.linspace(0, total - 1, LEVELS).round().astype(int)
    found: dict[str, Any] = {"timesteps": levels.tolist()}
    for kind, asked in (("caption", texts), ("no_caption", [""] * len(texts))):
        input_ids = torch.from_numpy(tokenizer(asked).input_ids).long()
        errors = [
            squared_errors(denoiser, latents, input_ids, torch.full((len(latents),), int(level)))
            for level in levels
        ]
        found[kind] = [round(float(each.mean()), 5) for each in errors]
    return found


def guidance(
    pictograms: Any,
    pairs: NDArray[np.int64],
    chosen: NDArray[np.int64],
    settings: BackendSettings,
) -> list[dict[str, float]]:
    """Return match and diversity at every scale.

    pairs: (n, 2) int64, subject and style of all originals; chosen: (k,) int64, places in pairs of
    those whose captions are drawn. Diversity is the mean distance of two pictures of a caption, 1
    being that of two originals.
    """
    from training.pictograms import STYLES, caption
    from training.quality import features

    originals = features(pictograms.images[pairs[:, 0], pairs[:, 1]])
    apart = _spread(originals)
    pipeline = Pipeline.load(MODEL, settings=settings)
    texts = [caption(pictograms.names[subject], STYLES[style]) for subject, style in pairs[chosen]]
    curve = []
    for scale in SCALES:
        drawn = [features(pictures) for pictures in _drawn(pipeline, texts, scale)]
        near = [
            np.linalg.norm(each[:, None] - originals[None], axis=2).argmin(axis=1) == own
            for each, own in zip(drawn, chosen, strict=True)
        ]
        curve.append(
            {
                "scale": scale,
                "top_1": round(float(np.mean(near)), 4),
                "diversity": round(float(np.mean([_spread(each) for each in drawn])) / apart, 4),
            }
        )
    return curve


def guidance_table(measured: Mapping[str, Any]) -> str:
    """Return match and diversity as a table in Markdown: a row for each scale."""
    request = measured["request"]
    lines = [
        f"{request['pictures']} held-out captions, {request['noises']} pictures of each in "
        f"{request['steps']} steps of {request['sampler']}; {measured['machine']['processor']}.",
        "",
        f"| guidance scale | nearest of {request['originals']} originals | diversity |",
        "|---|---|---|",
    ]
    for point in measured["guidance"]:
        lines.append(f"| {point['scale']:g} | {point['top_1']:.0%} | {point['diversity']:.2f} |")
    return "\n".join(lines)


def _drawn(pipeline: Pipeline, texts: list[str], scale: float) -> Iterator[NDArray[np.uint8]]:
    """Draw each caption from the same noises: (NOISES, H, W, 3)."""
    for text in texts:
        result = pipeline(
            [text] * NOISES,
            seed=SEED,
            num_inference_steps=20,
            guidance_scale=scale,
            sampler="ddim",
        )
        yield np.stack([np.asarray(image) for image in result.images])


def _spread(values: NDArray[np.float64]) -> float:
    """Return the mean distance between two rows."""
    pairs = combinations(range(len(values)), 2)
    return float(np.mean([np.linalg.norm(values[i] - values[j]) for i, j in pairs]))


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 5) for value in values]
