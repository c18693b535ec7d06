"""What does a watermark withstand, and what does it cost the picture?

On pictures of the model that ships, of several sizes: the share of bits that are read wrong where
the picture's size and place are known, how often the text is found where they are not, and the
marked picture's PSNR beside the one without.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import summary
from engine.backends.settings import BackendSettings
from runtime import Pipeline
from runtime.images.files import psnr
from runtime.images.watermark import embed_watermark, read_bits, read_watermark, watermark_bits

TEXT = "SDV2"
SIZES = (128, 256, 512)
PROMPTS = [
    *("a red apple, fluent style", "a cat face, noto style", "a sailboat, twemoji style"),
    *("a sunflower, fluent-flat style", "a rocket, noto style", "a snowman, twemoji style"),
]
STEPS, QUALITY, EDGE = 10, 75, 0.05
Picture = Image.Image


def measure(repeats: int) -> dict[str, Any]:
    """Draw pictures with as many seeds as repeats, mark, change and read them."""
    pipeline = Pipeline.load(settings=BackendSettings(backend="cpu"))
    pairs = []
    for size in SIZES:
        for seed in range(repeats):
            options = {"height": size, "width": size, "num_inference_steps": STEPS}
            images = pipeline(PROMPTS, seed=100 * seed, **options).images  # type: ignore[arg-type]
            pairs += [(image, embed_watermark(image, TEXT)) for image in images]
    report: dict[str, Any] = {
        "request": {"text": TEXT, "sizes": SIZES, "steps": STEPS, "pictures": len(pairs)},
        "psnr_db": summary([psnr(np.asarray(a), np.asarray(b).astype(float)) for a, b in pairs]),
        "found_without_one": _found([plain for plain, _ in pairs], lambda image: image),
    }
    for name, (change, restore) in CHANGES.items():
        errors = [_bit_error(restore(change(marked), marked.size)) for _, marked in pairs]
        report[name] = {
            "bit_error": {"mean": round(float(np.mean(errors)), 4), "max": round(max(errors), 4)},
            "found": _found([marked for _, marked in pairs], change),
        }
    return report


def _found(images: list[Picture], change: Callable[[Picture], Picture]) -> float:
    """Return the share of pictures in which the text is found after a change."""
    return round(float(np.mean([read_watermark(change(image)) == TEXT for image in images])), 4)


def _bit_error(image: Picture) -> float:
    return float(np.mean(read_bits(image) != watermark_bits(TEXT)))


def _same(image: Picture, size: tuple[int, int]) -> Picture:
    return image.resize(size, Image.Resampling.BICUBIC)


def _jpeg(image: Picture) -> Picture:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return Image.open(file).convert("RGB")


def _halved(image: Picture) -> Picture:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def _cropped(image: Picture) -> Picture:
    """Cut a tenth of each side off, at no multiple of a block."""
    edge = round(EDGE * image.width)
    return image.crop((edge, edge, image.width - edge, image.height - edge))


def _in_place(image: Picture, size: tuple[int, int]) -> Picture:
    """Put what was cut out where it was, on gray."""
    canvas, edge = Image.new("RGB", size, "gray"), round(EDGE * size[0])
    canvas.paste(image, (edge, edge))
    return canvas


CHANGES: Mapping[str, tuple[Callable[[Picture], Picture], Callable[..., Picture]]] = {
    "unchanged": (lambda image: image, _same),
    "jpeg_75": (_jpeg, _same),
    "half": (_halved, _same),
    "cropped_tenth": (_cropped, _in_place),
    "cropped_tenth_jpeg_75": (lambda image: _jpeg(_cropped(image)), _in_place),
    "half_jpeg_75": (lambda image: _jpeg(_halved(image)), _same),
}
