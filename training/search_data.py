"""What a search of hyper-parameters learns from and measures with: subjects in three parts.

No style of a subject that is measured with was trained on. The pairs that `held_out.txt` names are
in none of the parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import RequestError
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder
from training.dataset import PictogramTrainingSet
from training.diffusion import Examples
from training.pictograms import STYLES, Pictograms, caption

SHARES: Mapping[str, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Pictures that a loss is measured with, one caption of each.

    latents: (n, C, h, w); input_ids: (n, MAX_TOKENS) int64; originals: (n, H, W, 3) uint8
    """

    latents: Tensor
    input_ids: Tensor
    originals: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The parts of a data set; subjects: how many each of SHARES has."""

    train: Examples
    validation: Measured
    test: Measured
    held_out: Measured
    subjects: Mapping[str, int]


def split_subjects(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Share subjects out: their indices, int64 and rising, by the names of SHARES.

    Returns arrays of any shape (k,), which have no index in common. Raises RequestError where
    a part would be empty.
    """
    order = np.random.default_rng(seed).permutation(count)
    ends = np.rint(np.cumsum(list(SHARES.values()))[:-1] * count).astype(int)
    parts = dict(zip(SHARES, map(np.sort, np.split(order, ends)), strict=True))
    if empty := [name for name, part in parts.items() if not len(part)]:
        raise RequestError(
            f"the data set has {count} subjects, which leaves none for {' and '.join(empty)}; "
            "give one of at least 7"
        )
    return parts


def split(
    pictograms: Pictograms, trained: Autoencoder, tokenizer: Tokenizer, folder: Path
) -> Splits:
    """Encode the pictures and share them out; the latents are kept in `folder`."""
    flat = pictograms.images.reshape(-1, *pictograms.images.shape[2:])
    folder.mkdir(parents=True, exist_ok=True)
    encoded = autoencoder.encode_into(trained, flat, folder / "latents.npy")
    latents = encoded.unflatten(0, pictograms.held_out.shape)
    parts = split_subjects(len(pictograms.names))

    def measured(pairs: np.ndarray) -> Measured:
        texts = [caption(pictograms.names[subject], STYLES[style]) for subject, style in pairs]
        return Measured(
            latents=latents[pairs[:, 0], pairs[:, 1]],
            input_ids=torch.from_numpy(tokenizer(texts).input_ids).long(),
            originals=pictograms.images[pairs[:, 0], pairs[:, 1]],
        )

    def of(name: str) -> Measured:
        pairs = np.argwhere(~pictograms.held_out)
        return measured(pairs[np.isin(pairs[:, 0], parts[name])])

    learnt = PictogramTrainingSet.of(_subset(pictograms, parts["train"]))
    subjects = parts["train"][learnt.pairs[:, 0]]
    return Splits(
        train=Examples(
            latents=latents[subjects, learnt.pairs[:, 1]],
            captions=learnt.captions,
            draws=learnt.draws,
        ),
        validation=of("validation"),
        test=of("test"),
        held_out=measured(np.argwhere(pictograms.held_out)),
        subjects={name: len(part) for name, part in parts.items()},
    )


def _subset(pictograms: Pictograms, subjects: np.ndarray) -> Pictograms:
    return replace(
        pictograms,
        names=tuple(pictograms.names[i] for i in subjects),
        keywords=tuple(pictograms.keywords[i] for i in subjects),
        images=pictograms.images[subjects],
        held_out=pictograms.held_out[subjects],
        everyday=pictograms.everyday[subjects],
    )
