"""The canvas: which part of a picture is painted anew, and how a larger picture begins.

A mask is a picture: white is painted anew, black is kept, and gray goes to the nearer of both.
What is transparent in a mask is kept, whatever colour lies under it. A mask of another size or
shape is stretched over the picture. All of that is diffusers', which however does not look at
transparency, and takes a mask of 16 bits for white.
"""

import math
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from engine.errors import RequestError
from runtime.checks import check_number
from runtime.images.files import WHITE, as_rgb

__all__ = [
    "ALPHA",
    "BLUR",
    "GRAY",
    "MAX_BLUR",
    "MAX_SIDE",
    "extend",
    "gray_of",
    "latent_mask",
    "masked_pixels",
    "paste_back",
    "transparency",
    "white_of",
]

ALPHA = "alpha"  # as a mask: the image's own transparency
GRAY = 128  # what hides a pixel: the encoder's zero would be 127.5
MAX_SIDE = 8192  # pixels
MAX_BLUR = 1000  # pixels
BLUR = 4.0  # pixels: the feather reaches over the latents' cells of 8 that the mask's edge cuts
OVERLAP = 8  # pixels of the old picture beside a seam that are painted anew: a cell of the latents

_WHITE = 128  # of 255: the minimum that is painted anew


def latent_mask(
    mask: Image.Image, height: int, width: int, compression: int = 8
) -> NDArray[np.float32]:
    """Return a mask at the size of the latents: 1 where they are painted anew, 0 where kept.

    A cell is what the mask is at the cell's first pixel, so a line thinner than a cell may be lost.

    Args:
        mask: of any size and mode.
        height, width: of the picture in pixels, multiples of `compression`.
        compression: pixels along a side of a cell.

    Returns:
        (1, height // compression, width // compression) float32

    Raises:
        RequestError: nothing of the mask is white, or it has colours that Pillow cannot read.
    """
    white = _white(mask, height, width)
    cells = white[::compression, ::compression]
    if not white.any():
        raise RequestError(
            "the mask is black everywhere, and nothing is to be painted; make that white, 128 or "
            "more of 255"
        )
    if not cells.any():
        raise RequestError(
            f"the mask has no white area of {compression} x {compression} pixels or more when it "
            f"is as large as the picture ({width} x {height}); make more of it white, or have a "
            'small part enlarged by inpaint_area="masked" with a small mask_padding'
        )
    return cells[None].astype(np.float32)


def transparency(image: Image.Image) -> Image.Image:
    """Return the mask of mode L that is white where a picture is transparent, by half or more.

    Raises RequestError where nothing is.
    """
    alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else WHITE
    mask = Image.fromarray(np.where(np.atleast_2d(alpha) < _WHITE, WHITE, 0).astype(np.uint8))
    if mask.getbbox() is None:
        raise RequestError(
            'mask is "alpha" and nothing of the image is transparent; give a PNG or WebP whose '
            "part to paint is erased, or a mask of its own"
        )
    return mask


def masked_pixels(image: Image.Image, mask: Image.Image) -> NDArray[np.uint8]:
    """Hide what is painted anew under gray, as a nine-channel inpainting model is shown it.

    image: of any mode, as large as the result. Returns (height, width, 3) uint8.
    """
    pixels = np.array(as_rgb(image))
    pixels[_white(mask, image.height, image.width)] = GRAY
    return pixels


def paste_back(
    image: Image.Image, original: Image.Image, mask: Image.Image, blur: float = BLUR
) -> Image.Image:
    """Give a painted picture the original's own pixels outside of the mask.

    Under the mask's white every pixel stays the painted one, and the edge is feathered outwards
    only: there the painted picture weighs twice the blurred mask, up to 1, as in Automatic1111
    (which lets the original through in corners and thin lines of the mask's inside, too). Farther
    than 3 · blur pixels outside the mask every pixel is the original's, bit for bit.

    Args:
        image: as it was decoded; an original of another size is resized to it.
        blur: standard deviation of the feather in pixels, 0 to 1000.

    Returns:
        An RGB picture of the size of `image`.
    """
    kept = as_rgb(original)
    if kept.size != image.size:
        kept = kept.resize(image.size, Image.Resampling.LANCZOS)
    white = white_of(mask, image.height, image.width)
    inside = np.asarray(white)
    blurred = np.asarray(white.filter(ImageFilter.GaussianBlur(float(blur))))
    if blur < 1:  # Pillow's three passes reach a pixel each; a square within the circle is kept
        near = white.filter(ImageFilter.MaxFilter(2 * int(3 * blur / math.sqrt(2)) + 1))
        blurred = np.minimum(blurred, np.asarray(near))
    painted = np.maximum(inside, np.minimum(blurred, 127) * 2 + (blurred > 127))
    return Image.composite(as_rgb(image), kept, Image.fromarray(painted))


def extend(
    image: Image.Image,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    mask: Image.Image | None = None,
) -> tuple[Image.Image, Image.Image]:
    """Lay a picture on a larger canvas; returns the canvas and the mask of what is new on it.

    New area is filled with what is at the picture's edge, more blurred the farther away. The mask
    reaches 8 pixels into the picture, so that seams are painted over.

    Args:
        left, top, right, bottom: pixels to add, at least one of them above 0.
        mask: of the picture; its white is painted anew as well.

    Returns:
        An RGB picture and its mask of mode L, both as large as the canvas.

    Raises:
        RequestError: a number is negative or none, all are 0, or a side would be above 8192.
    """
    added = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in added.items():
        check_number(f"extend's {name}", pixels, Integral, 0, MAX_SIDE)
    if not any(added.values()):
        raise RequestError(
            "extend is 0, so the canvas grows on no side; add pixels left, top, right or bottom"
        )
    width, height = left + image.width + right, top + image.height + bottom
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            f"the canvas would have {width} x {height} pixels; each side may have {MAX_SIDE}, "
            "add fewer or begin with a smaller picture"
        )
    rows, columns = (top, image.height, bottom), (left, image.width, right)
    new = np.maximum(_new(*rows)[:, None], _new(*columns))
    if mask is not None:
        inside = new[top : top + image.height, left : left + image.width]
        inside[_white(mask, image.height, image.width)] = 255
    edges = np.pad(np.asarray(as_rgb(image)), ((top, bottom), (left, right), (0, 0)), "edge")
    canvas = _softened(Image.fromarray(edges), _away(*rows), _away(*columns))
    return canvas, Image.fromarray(new)


def white_of(mask: Image.Image, height: int, width: int) -> Image.Image:
    """Return a mask of (height, width) pixels and mode L: 255 where the picture is painted anew.

    Raises RequestError for colours that Pillow cannot read.
    """
    return Image.fromarray(WHITE * _white(mask, height, width).astype(np.uint8))


def _white(mask: Image.Image, height: int, width: int) -> NDArray[np.bool_]:
    """Stretch a mask over (height, width) pixels; True is painted anew."""
    return gray_of(mask, height, width) >= _WHITE


def gray_of(mask: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Stretch a mask of any mode over (height, width) pixels, uint8; what is transparent is black.

    Raises RequestError for colours that Pillow cannot read.
    """
    if mask.mode.startswith("I"):
        mask = as_rgb(mask)
    elif mask.has_transparency_data:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    try:
        # Resized before it becomes gray: a palette and two colours are resized to the nearest.
        gray = mask.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    except ValueError as error:
        raise RequestError(
            f"the mask cannot be read as gray ({error}); give a picture of mode L or RGB"
        ) from error
    return np.asarray(gray)


def _new(near: int, side: int, far: int) -> NDArray[np.uint8]:
    """Return the mask along one side: white margins, and a little more of what they border on."""
    overlap = min(OVERLAP, side // 4)
    kept_from = near + overlap if near else 0
    kept_to = near + side - overlap if far else near + side
    place = np.arange(near + side + far)
    return np.where((place >= kept_from) & (place < kept_to), 0, 255).astype(np.uint8)


def _away(near: int, side: int, far: int) -> NDArray[np.float64]:
    """Return how many pixels each place along a side is outside the picture."""
    place = np.arange(near + side + far)
    outside = np.maximum(near - place, place - (near + side - 1))
    return outside.clip(0, None).astype(np.float64)


def _softened(
    canvas: Image.Image, rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> Image.Image:
    """Blur a canvas the more, the farther its rows and columns are outside the picture.

    From 2 pixels outside on it is a canvas of half the size, made in the same way: blur grows
    with the distance, for little more than the work of one level.
    """
    if max(rows.max(), columns.max()) <= 1 or min(canvas.size) == 1:
        return canvas
    soft = _softened(canvas.reduce(2), rows[::2] / 2, columns[::2] / 2)
    down, across = ((255 * (away - 1).clip(0, 1)).astype(np.uint8) for away in (rows, columns))
    share = Image.fromarray(np.maximum(down[:, None], across))
    box = (0, 0, canvas.width / 2, canvas.height / 2)  # an odd side's half has a pixel too much
    soft = soft.resize(canvas.size, Image.Resampling.BILINEAR, box)
    return Image.composite(soft, canvas, share)
