"""Masks as Automatic1111's API has them: painted outside instead of inside, and filled at first."""

from PIL import Image, ImageFilter, ImageOps

from runtime.images.canvas import white_of
from runtime.images.files import as_rgb

__all__ = ["fill_masked", "invert_mask"]

# Radii of the blurs in pixels, the widest first, and how often each is laid over what is there.
BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2))


def invert_mask(mask: Image.Image) -> Image.Image:
    """Return the mask of mode L that paints what another keeps. Raises RequestError."""
    return ImageOps.invert(white_of(mask, mask.height, mask.width))


def fill_masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture whose part to paint is the blurred colours around it ("fill").

    As in Automatic1111 (`modules/masking.py`), blurs of what is kept lie over each other, the
    narrowest on top; what no blur reaches is black. Every kept pixel stays, bit for bit.
    image: of any mode; mask: white where it is painted, stretched over the image
    Returns an RGB picture. Raises RequestError for a mask whose colours cannot be read.
    """
    picture = as_rgb(image)
    white = white_of(mask, picture.height, picture.width)
    kept = picture.convert("RGBA")
    kept.putalpha(ImageOps.invert(white))
    premultiplied = kept.convert("RGBa")  # or what is hidden would colour the blurs
    canvas = Image.new("RGBA", picture.size)
    for radius, times in BLURS:
        blurred = premultiplied.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            canvas.alpha_composite(blurred)
    return Image.composite(canvas.convert("RGB"), picture, white)
