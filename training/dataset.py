"""What a training draws from: pictures, and a way to caption each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.errors import RequestError
from training.pictograms import Pictograms, all_captions, hide_synonyms, random_caption
from training.store import CaptionedImages

EVERYDAY_SHARE = 0.7  # of the draws, where a data set has all subjects
PICTOGRAMS, CAPTIONED = "data.npz", "data"  # in the working folder
CAPTIONS = 32  # of each pictogram, drawn once before the training


class TrainingSet(Protocol):
    """What both kinds of data set offer."""

    @property
    def images(self) -> np.ndarray:
        """Pictures (n, H, W, 3) uint8."""
        ...

    @property
    def prompts(self) -> list[str]:
        """Texts for the sample grids."""
        ...

    @property
    def draws(self) -> np.ndarray | None:
        """How often each picture is drawn beside the others, (n,) float64; None: all alike."""
        ...

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """Draw one caption of a picture."""
        ...

    def captions(self, index: int, rng: np.random.Generator) -> Sequence[str]:
        """Return the captions of a picture that a training draws from."""
        ...

    def vocabulary_texts(self) -> Iterable[str]:
        """Return texts that hold every word whose tokens must be whole."""
        ...


@dataclass(frozen=True, slots=True)
class PictogramTrainingSet:
    """The pairs of subject and style that are not held out."""

    pictograms: Pictograms
    pairs: np.ndarray
    images: np.ndarray
    prompts: list[str]
    draws: np.ndarray | None

    @classmethod
    def of(cls, pictograms: Pictograms) -> "PictogramTrainingSet":
        """Take the training pairs out of the whole data set."""
        pairs = np.argwhere(~pictograms.held_out)
        wanted = ("red apple", "cat face", "pizza", "sailboat", "snowman", "sunflower", "rocket")
        return cls(
            pictograms=pictograms,
            pairs=pairs,
            images=pictograms.images[~pictograms.held_out],
            prompts=[f"{name}, {style} style" for name in wanted for style in ("fluent", "noto")],
            draws=_draws(pictograms.everyday[pairs[:, 0]]),
        )

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """Draw one of the ways to ask for a pictogram."""
        subject, style = self.pairs[index]
        names, keywords = self.pictograms.names, self.pictograms.keywords
        return random_caption(names[subject], keywords[subject], int(style), rng)

    def captions(self, index: int, rng: np.random.Generator) -> Sequence[str]:
        """Draw CAPTIONS ways to ask for a pictogram."""
        return [self.caption(index, rng) for _ in range(CAPTIONS)]

    def vocabulary_texts(self) -> Iterable[str]:
        """Return the names and the styles; keywords may fall into pieces."""
        return all_captions(self.pictograms)


@dataclass(frozen=True, slots=True)
class CaptionedTrainingSet:
    """Pictures of a folder, each with one caption or several."""

    captioned: CaptionedImages
    images: np.ndarray
    prompts: list[str]
    draws: np.ndarray | None = None

    @classmethod
    def of(cls, captioned: CaptionedImages) -> "CaptionedTrainingSet":
        """Take every picture; the first captions serve the sample grids."""
        prompts = [captions[0] for captions in captioned.captions[:8]]
        return cls(captioned=captioned, images=captioned.images, prompts=prompts)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """Draw one of the picture's captions, each equally likely."""
        captions = self.captioned.captions[index]
        return captions[int(rng.integers(len(captions)))]

    def captions(self, index: int, rng: np.random.Generator) -> Sequence[str]:
        """Return all captions of a picture."""
        return self.captioned.captions[index]

    def vocabulary_texts(self) -> Iterable[str]:
        """Return all captions."""
        return (caption for captions in self.captioned.captions for caption in captions)


def _draws(everyday: np.ndarray) -> np.ndarray | None:
    """Give the pictures of everyday subjects their share of the draws, if there are others."""
    others = ~everyday
    if not others.any() or not everyday.any():
        return None
    draws: np.ndarray = np.where(
        everyday, EVERYDAY_SHARE / everyday.sum(), (1 - EVERYDAY_SHARE) / others.sum()
    )
    return draws


def load_training_set(work: Path, *, without_synonyms: bool = False) -> TrainingSet:
    """Read what `python -m training data` wrote: pictograms, or a folder of captioned pictures.

    without_synonyms: leave the words of `unseen_synonyms` out of the captions
    Raises RequestError when it has not run yet.
    """
    pictograms, captioned = work / PICTOGRAMS, work / CAPTIONED
    if pictograms.exists():
        loaded = Pictograms.load(pictograms)
        return PictogramTrainingSet.of(hide_synonyms(loaded) if without_synonyms else loaded)
    if captioned.exists():
        return CaptionedTrainingSet.of(CaptionedImages.load(captioned))
    raise RequestError(f"there is no data in {work}; run `python -m training data` first")
