"""A safety checker: the folder `safety_checker/` of a model in diffusers' layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.component import Component, Source, assemble
from engine.checkpoints.formats.files import Weights, open_weights, require_finite
from engine.checkpoints.image_encoder import refuse_other_tensors
from engine.configs.safety_checker import SafetyCheckerConfig
from engine.errors import ModelError

__all__ = ["SafetyCheckerFile"]

FOLDER = "safety_checker"
VISION = "vision_model."  # transformers 5 leaves one of two such words out of names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SafetyCheckerFile:
    """A safety checker's architecture, its weights under its graph's names, and its concepts.

    concepts, special: (n, P) float32, directions of CLIP's space, with a threshold for the cosine
        to each, (n,): what pictures are checked for, and what makes the check stricter
    """

    path: Path
    config: SafetyCheckerConfig
    weights: Component
    concepts: NDArray[np.float32]
    concept_thresholds: NDArray[np.float32]
    special: NDArray[np.float32]
    special_thresholds: NDArray[np.float32]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the folder, or that of a whole model that holds it.

        Raises ModelError when it is none, and for a tensor that is missing, left over or of
        another shape.
        """
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{str(folder)!r} holds no config.json; give {SafetyCheckerConfig.WANTED}"
            )
        config, weights = SafetyCheckerConfig.load(folder), open_weights(folder)
        doubled = any(name.startswith(VISION * 2) for name in weights)
        sources = {
            name: Source(name=name if doubled else name.replace(VISION * 2, VISION))
            for name in config.tensor_shapes()
        }
        component = assemble(folder, weights, config, sources)
        concepts, special = (
            _concepts(folder, weights, name, config.projection_dim)
            for name in ("concept_embeds", "special_care_embeds")
        )
        own = {f"{name}_embeds" for name in ("concept", "special_care")}
        own |= {f"{name}_weights" for name in own}
        refuse_other_tensors(folder, weights, component.used() | own)
        return cls(
            path=folder,
            config=config,
            weights=component,
            concepts=concepts[0],
            concept_thresholds=concepts[1],
            special=special[0],
            special_thresholds=special[1],
        )


def _concepts(
    folder: Path, weights: Weights, name: str, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read directions (n, width) and their thresholds (n,); raises ModelError."""
    found = []
    for each, axes in ((name, 2), (f"{name}_weights", 1)):
        stored = weights.tensors.get(each)
        if stored is None:
            raise ModelError(
                f"{folder} lacks {each}, so it is no safety checker; give the folder "
                "safety_checker/ of a model in diffusers' layout"
            )
        if len(stored.shape) != axes or not stored.is_float:
            raise ModelError(
                f"{folder}: {each} has the shape {list(stored.shape)} of {stored.dtype}, and "
                f"{axes} axes of floats are expected; the file is damaged"
            )
        found.append(np.asarray(weights[each], np.float32))
        require_finite(folder, each, found[-1])
    directions, thresholds = found
    if directions.shape != (len(thresholds), width):
        raise ModelError(
            f"{folder}: {name} has the shape {list(directions.shape)}, and "
            f"{[len(thresholds), width]} is expected; the file is damaged"
        )
    return directions, thresholds
