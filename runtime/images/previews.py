"""What a picture looks like while it is drawn: cheap previews, a strip of steps, an animation.

A preview is linear: each latent gives one pixel, a sum of its channels for red, green and blue. The
sums are fitted to the autoencoder at hand by least squares, so no model needs a table. The best
pictures to fit to are the finished ones, which are decoded anyway; before there are any, `probe`
gives latents that serve all pictures nearly as well as their own would. Sharper ones, at a higher
price, are a tiny decoder's: `Pipeline.previews`.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from engine.errors import OutputError, RequestError
from engine.store.cache import write_atomically
from runtime.images.files import Sign, SourceType, check_output, xmp_packet

Array = NDArray[np.float32]

# Every channel high in one half of the blocks and low in the other. Normal noise, and small blocks,
# decode to textures that no finished picture has; far from 0 the decoder's norms hide the scale.
PROBE_LEVEL, PROBE_BLOCKS, PROBE_BLOCK = 0.75, 8, 4
GAP = 4  # pixels of white between pictures
QUALITY = 85  # of 100, of the animation's frames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preview:
    """A linear map from latents to pixels of 0 to 255, one map for all pictures or one for each.

    factors: (1 or B, C, 3) float32; bias: (1 or B, 1, 3) float32
    """

    factors: Array
    bias: Array

    @classmethod
    def fit(cls, latents: Array, images: Sequence[Image.Image]) -> Self:
        """Fit one map for each picture, by least squares; h w should be well above C.

        latents: (B, C, h, w); images: B, decoded from them, of any size
        """
        size = latents.shape[-1], latents.shape[-2]
        small = [image.resize(size, Image.Resampling.BOX) for image in images]
        colours = np.stack([np.asarray(image, np.float32).reshape(-1, 3) for image in small])
        points = _points(latents)
        ones = np.ones_like(points[..., :1])
        solution = np.linalg.pinv(np.concatenate([points, ones], axis=-1)) @ colours
        return cls(factors=solution[:, :-1], bias=solution[:, -1:])

    def draw(self, latents: Array, scale: int = 8) -> list[Image.Image]:
        """Draw B pictures of `scale` h by `scale` w pixels, smoothly enlarged.

        latents: (B, C, h, w); B is any number where one map serves all
        """
        batch, _, height, width = latents.shape
        colours = _points(latents) @ self.factors + self.bias
        pixels = colours.clip(0, 255).round().astype(np.uint8).reshape(batch, height, width, 3)
        size = width * scale, height * scale
        return [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in pixels]


def _points(latents: Array) -> Array:
    """Return (B, h w, C)."""
    batch, channels = latents.shape[:2]
    return finite(latents).reshape(batch, channels, -1).swapaxes(1, 2)


def finite(latents: Array) -> Array:
    """Put 0 for numbers that are none, which must not stop a preview; the shape stays."""
    return np.nan_to_num(latents, nan=0, posinf=0, neginf=0).astype(np.float32)


def probe(channels: int) -> Array:
    """Return latents whose decode serves `Preview.fit` before a picture is finished.

    They are (1, C, 32, 32) float32: blocks of one value, and every channel is as often high as low.
    """
    levels = np.tile([-PROBE_LEVEL, PROBE_LEVEL], (channels, PROBE_BLOCKS**2 // 2))
    mixed = np.random.default_rng(0).permuted(levels, axis=1)
    blocks = mixed.reshape(1, channels, PROBE_BLOCKS, PROBE_BLOCKS)
    return np.kron(blocks, np.ones((PROBE_BLOCK, PROBE_BLOCK))).astype(np.float32)


def parse_steps(text: str, total: int) -> tuple[int, ...]:
    """Read steps such as "1,5,10", each from 1 to `total`, into rising order.

    Raises RequestError.
    """
    parts = [part.strip() for part in text.split(",")]
    steps = [int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in parts]
    wrong = [part for part, step in zip(parts, steps, strict=True) if not 1 <= step <= total]
    wrong = wrong or [part for i, part in enumerate(parts) if steps[i] in steps[:i]]
    if wrong:
        raise RequestError(
            f"preview_steps {text!r} hold {wrong[0]!r}; give different whole numbers from 1 to "
            f"{total} with commas between them, such as 1,{total}"
        )
    return tuple(sorted(steps))


def side_by_side(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Put pictures of one size beside each other with white between them, RGB.

    rows: one for each picture of a batch, with its state at every step that is shown
    captions: one above each column, or none; of Latin letters and digits
    labels: one to the left of each row, or none
    """
    width, height = (
        max(getattr(image, side) for row in rows for image in row) for side in ("width", "height")
    )
    font_size = _font_size(width)
    font = _font(font_size)
    left, top = _margins(width, captions, labels)
    across, down = width + GAP, height + GAP
    size = sheet_size(len(rows), len(rows[0]), (width, height), captions, labels)
    sheet = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (left + j * across, top + i * down))
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions):
        middle = left + j * across + (width - draw.textlength(caption, font)) / 2
        draw.text((middle, font_size // 2), caption, "black", font)
    for i, label in enumerate(labels):
        draw.text((font_size // 2, top + i * down + height // 2), label, "black", font)
    return sheet


def sheet_size(
    rows: int,
    columns: int,
    cell: tuple[int, int],
    captions: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> tuple[int, int]:
    """Return the width and height that `side_by_side` makes of pictures of a width and height."""
    width, height = cell
    left, top = _margins(width, captions, labels)
    return left + columns * (width + GAP) - GAP, top + rows * (height + GAP) - GAP


def _margins(width: int, captions: Sequence[str], labels: Sequence[str]) -> tuple[int, int]:
    """Return the pixels left of pictures of a width, for labels, and above them."""
    size = _font_size(width)
    measure, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), _font(size)
    left = max((int(measure.textlength(label, font)) + size for label in labels), default=0)
    return left, 2 * size if captions else 0


def _font_size(width: int) -> int:
    return max(12, width // 24)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font; without FreeType it has one size."""
    return ImageFont.load_default(size if features.check("freetype2") else None)


def check_animation(path: Path) -> None:
    """Refuse a path that no animation could be written to; raises OutputError."""
    if path.suffix.lower() != ".webp":
        raise OutputError(f"the animation {path} ends in {path.suffix!r}; give a name in .webp")
    check_output(path)


def write_animation(
    path: Path,
    frames: Sequence[Image.Image],
    *,
    frame_ms: int = 100,
    hold_ms: int = 2000,
    source_type: SourceType | None = "trainedAlgorithmicMedia",
    sign: Sign | None = None,
) -> None:
    """Write a WebP that plays again and again, whole or not at all.

    frames: one or more of one size; frame_ms: how long each is shown; hold_ms: the last one
    source_type: what the file is marked as, None to leave the mark out
    sign: such as `Credentials.sign`
    Raises OutputError when it cannot be written; a file that was there then stays as it was.
    """
    check_animation(path)
    durations = [frame_ms] * (len(frames) - 1) + [hold_ms]

    def write(target: BinaryIO) -> None:
        file = io.BytesIO()
        frames[0].save(
            file,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            quality=QUALITY,
            xmp=xmp_packet(source_type) if source_type else b"",
        )
        data = file.getvalue()
        target.write(sign(data, "WEBP", source_type or "trainedAlgorithmicMedia") if sign else data)

    write_atomically(path, write)
