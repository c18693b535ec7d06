"""Image prompts: pictures that are attended to beside the text, by an IP-Adapter of the pipeline.

(Ye et al. 2023, arXiv:2308.06721.) The pictures of one prompt share an attention, as those of one
adapter do in diffusers; those of several add up, as several adapters or masks do there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError
from engine.graphs.steering import ip_weights
from engine.model import Model
from runtime.checks import check_image
from runtime.control import check_course, course, parse_weighed, points_of, written
from runtime.images.canvas import gray_of
from runtime.images.files import upright
from runtime.images.frame import Frame
from runtime.images.upscaling import upscale_latents

__all__ = [
    "NO_MASK",
    "ImagePrompt",
    "attention_maps",
    "checked_image_prompts",
    "parse_image_prompt",
    "with_image_prompts",
]

Array = NDArray[np.float32]
NO_MASK = "none"  # what the command line says where a picture counts everywhere
MAX_PROMPTS = 16
MAX_PICTURES = 16  # of one prompt
HALF = 128  # of 255: where a mask is lighter, the picture counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ImagePrompt:
    """Pictures, and the IP-Adapter that sees them. Raises RequestError when it is made wrongly.

    image: a picture or several, which are then seen as one prompt
    adapter: the IP-Adapter's name in the pipeline; None for the only one
    scale: how much it counts, 1 as trained; several numbers are a curve over the run
    start, end: the part of the run in which it counts, at the calls that lie whole in it
    mask: where it is white the picture counts; None for everywhere
    """

    image: Image.Image | Sequence[Image.Image]
    adapter: str | None = None
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        """Refuse what no IP-Adapter could do."""
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise RequestError(
                f"an image prompt's adapter is {self.adapter!r}; give an IP-Adapter's name"
            )
        several = isinstance(self.image, Sequence) and not isinstance(self.image, str)
        pictures: list[Image.Image] = [*self.image] if several else [self.image]  # type: ignore
        if not 0 < len(pictures) <= MAX_PICTURES:
            raise RequestError(
                f"an image prompt has {len(pictures)} pictures; give 1 to {MAX_PICTURES}"
            )
        for picture in pictures:
            check_image("an image prompt's image", picture)
        object.__setattr__(self, "image", tuple(map(upright, pictures)))
        check_course("an image prompt", "scale", self.scales, self.start, self.end)
        if self.mask is not None:
            check_image("an image prompt's mask", self.mask)
            object.__setattr__(self, "mask", upright(self.mask))
            if gray_of(self.mask, self.mask.height, self.mask.width).max() < HALF:
                raise RequestError(
                    "an image prompt's mask is black everywhere; make white where it is to count"
                )

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures."""
        assert isinstance(self.image, tuple)
        return self.image

    @property
    def scales(self) -> tuple[float, ...]:
        """The points of the curve that the scale is."""
        return points_of(self.scale)

    @property
    def text(self) -> str:
        """The prompt as the command line writes one, with the adapter in the picture's place."""
        return written(self.adapter or "ip-adapter", self.scales, self.start, self.end)

    def over(self, calls: int) -> NDArray[np.float64]:
        """Return its scale at each call of a run: (calls,) float64."""
        return course(self.scales, self.start, self.end, calls)


def checked_image_prompts(prompts: object) -> tuple[ImagePrompt, ...]:
    """Return a request's image prompts; raises RequestError for what are none."""
    if isinstance(prompts, ImagePrompt):
        return (prompts,)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise RequestError(
            f"image_prompts came as {type(prompts).__name__}; give a list of ImagePrompt"
        )
    for prompt in prompts:
        if not isinstance(prompt, ImagePrompt):
            raise RequestError(
                f"image_prompts hold a {type(prompt).__name__}; give ImagePrompt(image=...)"
            )
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"image_prompts are {len(prompts)}; give {MAX_PROMPTS} at most")
    return tuple(prompts)


def parse_image_prompt(text: str) -> tuple[str, tuple[float, ...], float, float]:
    """Read PICTURE, PICTURE:SCALE or PICTURE:SCALE@START:END as `parse_weighed` does.

    Raises RequestError.
    """
    found = parse_weighed(text)
    if found is None:
        raise RequestError(
            f"{text[:200]!r} names no picture; give PICTURE or PICTURE:SCALE@START:END"
        )
    return found


def with_image_prompts(
    conditioning: Sequence[Mapping[str, Array]],
    prompts: Sequence[ImagePrompt],
    positives: int,
    maps: Mapping[str, Array],
) -> list[Mapping[str, Array]]:
    """Add to each call's inputs how much every picture counts: (g, B, k, h, w) a level.

    positives: groups that guidance moves to, which are the last; the others attend to no picture,
        and where a call has some, k counts what stands for it behind the prompts
    maps: of `attention_maps`, by the inputs' names
    """
    scales = np.stack([prompt.over(len(conditioning)) for prompt in prompts], axis=1)
    guided = any(len(call["context"]) > positives for call in conditioning)
    made: dict[tuple[int, bytes], Mapping[str, Array]] = {}
    calls = list[Mapping[str, Array]]()
    for call, scale in zip(conditioning, scales.astype(np.float32), strict=True):
        groups, batch = call["context"].shape[:2]
        key = groups, scale.tobytes()
        if key not in made:
            counts = np.zeros((groups, 1 + guided, len(prompts)), np.float32)
            counts[max(groups - positives, 0) :, 0] = scale
            counts[: max(groups - positives, 0), -1] = scale
            both = counts.reshape(groups, -1)[:, None, :, None, None]
            made[key] = {
                name: np.repeat(both * np.tile(level, (1 + guided, 1, 1)), batch, axis=1)
                for name, level in maps.items()
            }
        calls.append({**call, **made[key]})
    return calls


def attention_maps(
    prompts: Sequence[ImagePrompt],
    model: Model,
    frame: Frame | None,
    size: tuple[int, int],
) -> dict[str, Array]:
    """Return where each picture counts at each level that attends, (k, h, w), by the input's name.

    As diffusers' IPAdapterMaskProcessor: a mask is black or white, then resampled to each level.
    frame: of which the masks' drawn part is taken; size: height and width in pixels of what is
    drawn
    """
    found = {}
    masks = [_mask(prompt.mask, frame, size) for prompt in prompts]
    for level, name in ip_weights(model.unet).items():
        height, width = (side // model.vae.compression for side in size)
        for _ in range(level):
            height, width = (height + 1) // 2, (width + 1) // 2
        places = [
            np.ones((height, width), np.float32)
            if mask is None
            else upscale_latents(mask[None, None], height, width, "bicubic")[0, 0]
            for mask in masks
        ]
        found[name] = np.stack(places)
    return found


def _mask(mask: Image.Image | None, frame: Frame | None, size: tuple[int, int]) -> Array | None:
    if mask is None:
        return None
    if frame is not None:
        mask = frame.drawn(Image.fromarray(gray_of(mask, mask.height, mask.width)))
    return np.asarray(gray_of(mask, *size) >= HALF, np.float32)
