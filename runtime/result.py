"""What a pipeline gives: images, each with what it was made with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The images, in the order of the prompts, and what each was made with.

    settings: of each image, as `runtime.images.files.write_image` keeps them in a file
    notes: sentences on what the prompts ask for in vain, such as an adapter that is not there
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayResult:
    """What an `output_type` of "np" or "latent" gives, in the order of the prompts.

    images: (B, H, W, 3) float32 of 0 to 1, or latents (B, C, h, w) float32
    seeds, settings: as `Result` has them
    """

    images: NDArray[np.float32]
    seeds: list[int]
    settings: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, images: NDArray[np.float32], plan: Plan) -> Self:
        """Return a plan's result of images (B, H, W, 3), or of latents (B, C, h, w)."""
        return cls(images=images, seeds=plan.seeds, settings=plan.settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnImage:
    """An image of several requests, and what it was made with.

    request: the index of its request; settings, notes: as `Result` has them
    """

    image: Image.Image
    request: int
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
