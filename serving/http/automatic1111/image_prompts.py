"""Units of sd-webui-controlnet whose model is an IP-Adapter: image prompts.

Names of its modules, and of Forge's, whose image encoder is here that of the IP-Adapter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import choice
from serving.http.automatic1111.units import PARAM, Unit, pictures_of_unit, refused
from serving.http.fields import Catalog
from serving.steering import ImagePromptRequest
from serving.uploads import read_base64

__all__ = ["IP_MODULES", "image_prompt_of", "is_ip_adapter"]

IP_MODULES = (
    "ip-adapter-auto",
    "ip-adapter_clip_h",
    "ip-adapter_clip_g",
    "ip-adapter_clip_sd15",
    "ip-adapter_clip_sdxl",
    "ip-adapter_clip_sdxl_plus_vith",
    "CLIP-ViT-H (IPAdapter)",
    "CLIP-ViT-bigG (IPAdapter)",
)
NO_MODULE = ("none", "")
NOT_DONE: Mapping[str, str] = {
    "advanced_weighting": "every layer counts the same here",
    "ipadapter_input": "send the picture itself",
}


def is_ip_adapter(unit: Unit, catalog: Catalog) -> bool:
    """Tell whether a unit wants a picture attended to, by its model or its module."""
    return _name(unit) in catalog.ip_adapters or unit.module in IP_MODULES


def image_prompt_of(unit: Unit, catalog: Catalog, image: bytes | None) -> ImagePromptRequest:
    """Return what a unit asks for; image: what is drawn over, which a unit without one sees.

    Raises BadRequestError, and NotFoundError for an IP-Adapter that is not here.
    """
    module = unit.module or ""
    if module not in (*IP_MODULES, *NO_MODULE):
        raise refused(
            f"has the module {module[:60]!r} beside an IP-Adapter; {choice(module, IP_MODULES)}"
        )
    for name, why in NOT_DONE.items():
        if getattr(unit, name) is not None:
            raise refused(f"has {name}; {why}, so leave it out")
    pictures = _pictures(unit)
    if not pictures and image is not None:
        pictures = [image]
    if not pictures:
        raise refused("has a unit without its image; send the picture that is to be seen")
    mask = unit.effective_region_mask
    return ImagePromptRequest(
        adapter=catalog.ip_adapter(_name(unit), PARAM),
        pictures=tuple(pictures),
        mask=read_base64(PARAM, mask) if mask else None,
        scale=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
    )


def _name(unit: Unit) -> str:
    """Return the name that a title means, "name" or "name [hash]"."""
    return str(unit.model).partition(" [")[0].strip()


def _pictures(unit: Unit) -> list[bytes]:
    """Return a unit's pictures, one or a list of objects; masks of them are refused."""
    given = unit.image
    several: Sequence[Any] = given if isinstance(given, list) else [given]
    units = [unit]
    if any(isinstance(each, Mapping) for each in several):
        units = [unit.model_copy(update={"image": each}) for each in several]
    found = list[bytes]()
    for each in units:
        picture, mask = pictures_of_unit(each)
        if mask is not None:
            raise refused(
                "has a mask beside an IP-Adapter; cut the picture out, or say by "
                "effective_region_mask where it counts"
            )
        if picture is not None:
            found.append(picture)
    return found
