"""An adapter that somebody asks for: its file, and how much of it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = ["AdapterChoice", "as_choice", "parse_adapter"]

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """An adapter's file, and how much of it is added to the UNet and to the text encoders.

    0 gives the base itself, 1 what was trained; more and less than both are allowed.
    name: what prompts call it; None for the file's own name, without its ending
    strict: whether every module of it must fit the model
    """

    path: Path
    unet: float = 1.0
    text_encoder: float = 1.0
    name: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuse weights that nothing can be multiplied with."""
        for weight in (self.unet, self.text_encoder):
            if not math.isfinite(weight):
                raise ModelError(
                    f"{self.path} cannot be added with the weight {weight}; "
                    "give a finite number, such as 0.8"
                )

    @property
    def known_as(self) -> str:
        """What a prompt's `<lora:…>` calls it, in lower case."""
        return (self.path.stem if self.name is None else self.name).lower()

    def weight(self, component: str) -> float:
        """Return the weight for a component."""
        return self.unet if component == "unet" else self.text_encoder


def as_choice(lora: "str | Path | AdapterChoice") -> AdapterChoice:
    """Return a choice as it is, and read any other way to write one. Raises ModelError."""
    return lora if isinstance(lora, AdapterChoice) else parse_adapter(str(lora))


def parse_adapter(text: str) -> AdapterChoice:
    """Read `FILE`, `FILE:WEIGHT` or `FILE:UNET_WEIGHT:TEXT_ENCODER_WEIGHT`.

    Colons in FILE are its own unless a number follows. Raises ModelError when there is no file
    or a weight is not finite.
    """
    path, weights = text, list[float]()
    while len(weights) < 2:
        head, colon, last = path.rpartition(":")
        if not colon or not NUMBER.fullmatch(last.strip().lower()):
            break
        path, weights = head, [float(last), *weights]
    if not path.strip() or "\0" in path:
        raise ModelError(f"{short(text)} names no adapter; give FILE or FILE:WEIGHT")
    weights = weights or [1.0]
    return AdapterChoice(path=Path(path), unet=weights[0], text_encoder=weights[-1])
