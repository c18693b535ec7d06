"""Captioned pictures as an autoencoder encodes them, in files: what a checkpoint is trained on."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import RequestError
from engine.model import Model
from export.modules.autoencoder import Autoencoder
from training.captions import Record
from training.store import ENDS, TEXTS, ArrayWriter, Captions, mapped

MOMENTS, SIZES, MADE_OF = "moments.npy", "sizes.npy", "made_of.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """moments: (n, 2 C, h, w) float16, means and deviations of the latents, unscaled
    sizes: (n, 4) float32, height and width before scaling, and the corner that was cut at
    captions: of each picture
    """

    moments: Tensor
    sizes: Tensor
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.moments)

    @classmethod
    def load(cls, folder: Path) -> "Encoded":
        """Map what `encode` wrote."""
        return cls(
            moments=torch.from_numpy(mapped(folder / MOMENTS)),
            sizes=torch.from_numpy(mapped(folder / SIZES)),
            captions=Captions(mapped(folder / TEXTS), mapped(folder / ENDS)),
        )


@torch.no_grad()
def encode(
    records: Iterable[Record], autoencoder: Autoencoder, size: int, folder: Path, made_of: str
) -> None:
    """Encode the middle squares of pictures, scaled to `size`, into a folder, whole or not at all.

    made_of: told by `is_made_of` later. Raises RequestError when there is no picture.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config, end = autoencoder.config, 0
    side = size // config.compression
    device = next(autoencoder.parameters()).device
    with (
        ArrayWriter(partial / MOMENTS, (2 * config.latent_channels, side, side), "f2") as moments,
        ArrayWriter(partial / SIZES, (4,), np.float32) as sizes,
        ArrayWriter(partial / TEXTS, (), np.uint8) as texts,
        ArrayWriter(partial / ENDS, (), np.int64) as ends,
    ):
        for record in records:
            image = record.image()
            pixels, facts = square(image, size)
            batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
            moments.append(torch.cat(autoencoder.encode(batch), dim=1).cpu().numpy())
            sizes.append(np.array([facts], np.float32))
            text = json.dumps(record.captions).encode()
            texts.append(np.frombuffer(text, np.uint8))
            end += len(text)
            ends.append(np.array([end]))
        count = moments.count
    if not count:
        raise RequestError("there is no picture to train on; give at least one with a caption")
    (partial / MADE_OF).write_text(made_of, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def square(image: Image.Image, size: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Scale a picture's shorter side to `size` and cut its middle square: (size, size, 3) uint8.

    Also returns its height and width before, and the corner of the cut, top and left.
    """
    scale = size / min(image.size)
    wide, high = (max(round(side * scale), size) for side in image.size)
    scaled = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - size) // 2, (high - size) // 2
    pixels = np.array(scaled.crop((left, top, left + size, top + size)))
    return pixels, (image.height, image.width, top, left)


def is_made_of(folder: Path, made_of: str) -> bool:
    """Tell whether a folder was encoded from just this."""
    path = folder / MADE_OF
    return path.is_file() and path.read_text(encoding="utf-8") == made_of


def fingerprint(model: Model, size: int, sources: Sequence[Path], prompt: str | None) -> str:
    """Describe what is encoded: the model, and the names, sizes and times of all files."""
    files = sorted(
        file for source in sources for file in ([source] if source.is_file() else source.rglob("*"))
    )
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    changed = model.path.stat().st_mtime_ns
    return json.dumps([str(model.path.resolve()), changed, size, prompt, digest])
