"""An image encoder: the folder of CLIP's half for pictures, as transformers saves it."""

import re
from pathlib import Path

from engine.checkpoints.component import Component, Source, assemble, shown
from engine.checkpoints.formats.files import Weights, open_weights
from engine.configs.image_encoder import ImageEncoderConfig
from engine.errors import ModelError

__all__ = ["IMAGE_ENCODER", "is_image_encoder", "open_image_encoder", "refuse_other_tensors"]

IMAGE_ENCODER = "image_encoder"  # what its folder is called in a model's and beside an adapter
VISION = "vision_model."  # which transformers 5 leaves out of names
OTHER_HALF = r"text_model\..+|text_projection\.weight|logit_scale"  # of a whole CLIP
POSITIONS = r"(vision_model\.)*embeddings\.position_ids"


def is_image_encoder(folder: Path) -> bool:
    """Tell whether a folder's config.json says that it is an image encoder alone."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return '"CLIPVisionModelWithProjection"' in text


def open_image_encoder(path: Path) -> tuple[ImageEncoderConfig, Component]:
    """Open the folder, or that of a whole model that holds it; no weights are read.

    Raises ModelError when it is none, and for a tensor that is missing, left over or of another
    shape.
    """
    folder = path / IMAGE_ENCODER if (path / IMAGE_ENCODER).is_dir() else path
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json; give the folder of an image encoder (of CLIP's half "
            "for pictures: config.json and its weights), such as image_encoder/"
        )
    config, weights = ImageEncoderConfig.load(folder), open_weights(folder)
    bare = not any(name.startswith(VISION) for name in weights)
    sources = {
        name: Source(name=name.removeprefix(VISION) if bare else name)
        for name in config.tensor_shapes()
    }
    component = assemble(folder, weights, config, sources)
    refuse_other_tensors(folder, weights, component.used(), OTHER_HALF)
    return config, component


def refuse_other_tensors(folder: Path, weights: Weights, used: set[str], unused: str = "") -> None:
    """Raise ModelError for a further tensor: elsewhere CLIP's half for pictures is unused."""
    known = re.compile(f"{POSITIONS}|{unused}")
    left = [name for name in weights if name not in used and not known.fullmatch(name)]
    if left:
        raise ModelError(
            f"{folder} holds {shown(left[0])}, for which its config.json has no place; fetch the "
            "folder again"
        )
