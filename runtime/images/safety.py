"""Pictures checked for what their viewer may not want to see, by a checker that the user gives.

Nothing is checked unless one is given. The published one (Stable Diffusion's) compares CLIP's
embedding of a picture with those of a list of words that its makers keep to themselves (Rando et
al. 2022, arXiv:2210.04610); it errs in both directions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from engine.backends.base import Engine
from engine.backends.settings import BackendSettings, on_processor
from engine.checkpoints.safety_checker import SafetyCheckerFile
from engine.engines import open_engine
from engine.graphs.safety_checker import safety_checker_graph
from runtime.checks import check_image
from runtime.images.clip_pixels import clip_pixels

__all__ = ["SafetyChecker", "SafetyVerdict", "blurred"]

STRICTER = 0.01  # what every cosine gains where a special concept is found
DECIMALS = 3  # to which scores are rounded, as in diffusers
BLUR_PARTS = 12  # of a picture's longer side, each about a blurred spot

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyVerdict:
    """What a checker finds in a picture.

    concepts: indices of the concepts that it comes too near to; special: of those that make the
        check stricter
    """

    concepts: tuple[int, ...]
    special: tuple[int, ...]

    @property
    def is_flagged(self) -> bool:
        """Whether it comes too near to any concept."""
        return bool(self.concepts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SafetyChecker:
    """A safety checker with its engine; `load` makes one, a call checks a picture."""

    file: SafetyCheckerFile
    engine: Engine

    @classmethod
    def load(cls, folder: str | Path, *, settings: BackendSettings | None = None) -> Self:
        """Open the folder `safety_checker/` of a model in diffusers' layout, or the model's.

        settings: how it runs, in float32, on the processor whatever the backend
        Raises ModelError or BackendError.
        """
        chosen = on_processor(settings)
        file = SafetyCheckerFile.open(Path(folder))
        graph = safety_checker_graph(file.config, "float32")
        return cls(file=file, engine=open_engine(graph, file.weights, chosen, "float32"))

    def __call__(self, image: Image.Image) -> SafetyVerdict:
        """Check a picture, as diffusers' StableDiffusionSafetyChecker does.

        Raises RequestError for what is no picture, BackendError.
        """
        check_image("image", image)
        file, embedding = self.file, self._embedding(image)
        special = _scores(embedding, file.special, file.special_thresholds) > 0
        stricter = STRICTER if special.any() else 0.0
        near = _scores(embedding, file.concepts, file.concept_thresholds, stricter) > 0
        return SafetyVerdict(
            concepts=tuple(np.flatnonzero(near).tolist()),
            special=tuple(np.flatnonzero(special).tolist()),
        )

    def _embedding(self, image: Image.Image) -> Array:
        """Return where a picture is in CLIP's space, (P,)."""
        given = clip_pixels(image, self.file.config.image_size)
        found: Array = self.engine.run({"pixel_values": given})["image_embeds"][0]
        return found


def blurred(image: Image.Image) -> Image.Image:
    """Return a picture of which only colours and places can be told; its `info` stays."""
    radius = max(image.size) / BLUR_PARTS
    return image.filter(ImageFilter.GaussianBlur(radius))


def _scores(embedding: Array, directions: Array, thresholds: Array, more: float = 0.0) -> Array:
    """Return how far each cosine is above its threshold, (n,)."""
    cosines = _unit(directions) @ _unit(embedding)
    scores: Array = np.round(cosines - thresholds + np.float32(more), DECIMALS)
    return scores


def _unit(vectors: Array) -> Array:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Array = vectors / np.maximum(lengths, 1e-12)
    return unit
