"""Frames: how a picture lies in the sides that a model takes, and the way back.

A picture whose sides are no multiples of the model's cells is continued at its right and bottom
edges, and what is drawn of that is cut off again. Where only the masked part is drawn, that part is
cut out with a margin, enlarged to what is drawn at once, and laid back. Either way the result has
the picture's own size, and its own pixels where nothing was painted.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from PIL import Image

from runtime.images.canvas import paste_back, white_of
from runtime.images.files import as_rgb

__all__ = ["Frame"]

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A picture, and the part of it that is drawn.

    image: RGB, as large as the result; mask: white of its mask, as large, or None
    box: the part of the image that is drawn
    height, width: of what is drawn, in pixels, multiples of the model's cells
    inner: where the box lies in what is drawn; around it the box's edges are continued
    """

    image: Image.Image
    mask: Image.Image | None
    box: Box
    height: int
    width: int
    inner: Box

    @classmethod
    def padded(cls, image: Image.Image, mask: Image.Image | None, multiple: int) -> Self:
        """Return the frame of a whole picture in its own size."""
        return cls(
            image=as_rgb(image),
            mask=None if mask is None else white_of(mask, image.height, image.width),
            box=(0, 0, image.width, image.height),
            height=image.height + -image.height % multiple,
            width=image.width + -image.width % multiple,
            inner=(0, 0, image.width, image.height),
        )

    @classmethod
    def resized(cls, image: Image.Image, mask: Image.Image | None, height: int, width: int) -> Self:
        """Return the frame of a whole picture in other sides, multiples of the model's cells."""
        resized = as_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
        return cls.padded(resized, mask, 1)

    @classmethod
    def masked(
        cls, image: Image.Image, mask: Image.Image, height: int, width: int, padding: int
    ) -> Self:
        """Return the frame of what is masked in a picture, drawn in these sides.

        The box is the smallest around the mask's white and `padding` pixels more, grown to the
        shape of the sides as far as the picture reaches (diffusers' `padding_mask_crop`). A mask
        without white is refused later, by whoever lays it over the latents.
        """
        whole = cls.padded(image, mask, 1)
        assert whole.mask is not None
        left, top, right, bottom = whole.mask.getbbox() or whole.box
        columns = max(left - padding, 0), min(right + padding, image.width)
        rows = max(top - padding, 0), min(bottom + padding, image.height)
        across, down = columns[1] - columns[0], rows[1] - rows[0]
        if across * height > width * down:
            rows = _grown(*rows, across * height // width, image.height)
        else:
            columns = _grown(*columns, down * width // height, image.width)
        box = (columns[0], rows[0], columns[1], rows[1])
        inner = _centred(box[2] - box[0], box[3] - box[1], width, height)
        return replace(whole, box=box, height=height, width=width, inner=inner)

    def drawn_image(self) -> Image.Image:
        """Return what is drawn from, RGB of the frame's sides."""
        return self._laid_in(self.image.crop(self.box))

    def drawn_mask(self) -> Image.Image | None:
        """Return the mask of what is drawn from, of mode L."""
        return None if self.mask is None else self._laid_in(self.mask.crop(self.box))

    def drawn(self, picture: Image.Image) -> Image.Image:
        """Return the part of another picture that lies over what is drawn, of the frame's sides."""
        if picture.size != self.image.size:
            picture = picture.resize(self.image.size, Image.Resampling.LANCZOS)
        return self._laid_in(picture.crop(self.box))

    def restore(self, picture: Image.Image, blur: float | None) -> Image.Image:
        """Bring a drawn picture back to the image's size, RGB; a larger one grows by as much.

        blur: of the mask's feather, outside of which the image's own pixels come back; None keeps
            what was drawn in the whole box
        """
        across, down = picture.width / self.width, picture.height / self.height
        left, top, right, bottom = self.inner
        inner = round(left * across), round(top * down), round(right * across), round(bottom * down)
        part = picture.crop(inner)
        if self.mask is None:
            return part
        size = self.box[2] - self.box[0], self.box[3] - self.box[1]
        if part.size != size:
            part = part.resize(size, Image.Resampling.LANCZOS)
        if blur is not None:
            part = paste_back(part, self.image.crop(self.box), self.mask.crop(self.box), blur)
        whole = self.image.copy()
        whole.paste(part, self.box[:2])
        return whole

    def _laid_in(self, part: Image.Image) -> Image.Image:
        """Bring a part of the box's size into the frame's sides."""
        left, top, right, bottom = self.inner
        part = part.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        margins = [(top, self.height - bottom), (left, self.width - right)]
        pixels = np.asarray(part)
        return Image.fromarray(np.pad(pixels, [*margins, (0, 0)][: pixels.ndim], "edge"))


def _grown(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """Let an interval grow on both sides to a length, as far as it can within 0 and a limit."""
    more = max(length - (stop - start), 0)
    start, stop = start - more // 2, stop + more - more // 2
    if stop >= limit:
        start, stop = start - (stop - limit), limit
    return max(start, 0), min(stop - min(start, 0), limit)


def _centred(across: int, down: int, width: int, height: int) -> Box:
    """Return where a picture lies in the middle of another shape, as large as it can."""
    if width * down < across * height:
        size = width, max(down * width // across, 1)
    else:
        size = max(across * height // down, 1), height
    left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    return left, top, left + size[0], top + size[1]
