"""Facts of a safety checker: CLIP's half for pictures, as transformers' `config.json` names it."""

from dataclasses import dataclass
from typing import ClassVar

from engine.configs.image_encoder import ImageEncoderConfig

__all__ = ["SafetyCheckerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyCheckerConfig(ImageEncoderConfig):
    """A StableDiffusionSafetyChecker's image encoder; the published one is ViT-L/14."""

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ("StableDiffusionSafetyChecker",)
    VISION: ClassVar[str] = "vision_model.vision_model"
    WANTED: ClassVar[str] = "the folder 'safety_checker' of a model in diffusers' layout"
