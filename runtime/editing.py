"""Models that edit a picture by an instruction (InstructPix2Pix), and how they are guided.

(Brooks et al. 2023, arXiv:2211.09800, equation 3.) The UNet sees the picture's latents beside its
own. Three groups of conditionings are weighed with s, the guidance scale, and s_I, that of the
picture:

    out = out(no picture, no text) + s_I (out(picture, no text) - out(no picture, no text))
        + s (out(picture, text) - out(picture, no text))
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import FindEngine
from engine.configs.diffusion import AutoencoderConfig
from engine.errors import RequestError
from engine.model import Model
from runtime.images import tiles
from runtime.request import Request

__all__ = ["check_editing", "edited_calls", "edited_latents"]

Array = NDArray[np.float32]
IMAGE_GUIDANCE_SCALE = 1.5
OF_OTHERS = ("mask", "extend", "strength", "image_noise", "hires")  # that cannot act here


def check_editing(request: Request, model: Model) -> None:
    """Refuse what a model that edits cannot do, and a scale that only such a one has.

    Raises RequestError.
    """
    if not model.is_editing:
        if request.image_guidance_scale is not None:
            raise RequestError(
                f"image_guidance_scale is for models that edit pictures, such as InstructPix2Pix, "
                f"and {model.path} draws; leave it out, or say with strength how far to go"
            )
        return
    if request.image is None:
        raise RequestError(
            f"{model.path} edits a picture as the prompt tells it, and came without image; give "
            "the picture"
        )
    given = [name for name in OF_OTHERS if getattr(request, name) is not None]
    given += ["controls"] if request.controls else []
    given += ["apg"] if request.apg else []
    if given:
        raise RequestError(
            f"{model.path} edits a whole picture from noise, and {given[0]} came; leave it out"
        )


def edited_calls(
    conditioning: Sequence[Mapping[str, Array]], scale: float | None, prompts: int
) -> list[Mapping[str, Array]]:
    """Add the group that sees neither text nor picture, and say which groups see the picture.

    conditioning: of each call, [uncond, cond]; scale: s_I, None for the usual
    prompts: groups that guidance moves to; a call with no others is not guided
    `shown` (g, B) is 1 where a group sees the picture, else 0.
    """
    scale = IMAGE_GUIDANCE_SCALE if scale is None else scale
    doubled: dict[int, Array] = {}

    def with_first(array: Array) -> Array:
        if id(array) not in doubled:
            doubled[id(array)] = np.concatenate([array[:1], array])
        return doubled[id(array)]

    calls = list[Mapping[str, Array]]()
    for call in conditioning:
        weights = call["guidance"]
        if len(weights) == prompts:
            calls.append({**call, "shown": np.ones(weights.shape[:2], np.float32)})
            continue
        first = np.full_like(weights[:1], 1 - scale)
        guidance = np.concatenate([first, weights[:1] - first, weights[1:]])
        shown = np.ones(guidance.shape[:2], np.float32)
        shown[0] = 0
        texts = {name: with_first(call[name]) for name in call if name != "guidance"}
        calls.append({**texts, "guidance": guidance, "shown": shown})
    return calls


def edited_latents(
    model: Model, engine: FindEngine, image: Image.Image | None, batch: int
) -> Array:
    """Return the latents of the image that is edited, (B, C, h, w): the mean, not scaled."""
    vae, pixels = model.vae, np.asarray(image)[None]
    height, width = (side // vae.compression for side in pixels.shape[1:3])
    silence = np.zeros((1, vae.latent_channels, height, width), np.float32)
    run = engine("vae_encoder").run
    mean = tiles.encode(run, np.ascontiguousarray(pixels), silence, vae.compression)
    if isinstance(vae, AutoencoderConfig):  # others scale nothing
        mean = mean / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)
    return np.repeat(mean, batch, axis=0)
