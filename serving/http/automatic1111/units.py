"""A unit of sd-webui-controlnet, as clients write it.

Facts of its `internal_controlnet/args.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import BadRequestError
from serving.http.documents import invalid
from serving.uploads import read_base64

__all__ = ["PARAM", "Unit", "pictures_of_unit", "refused", "type_of_unit", "unit_of"]

PARAM = "alwayson_scripts"
UNKNOWN = "Unknown"
# Names of what a union's pictures are, with ours.
UNION_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "OpenPose": "openpose",
        "Depth": "depth",
        "Soft Edge": "scribble",
        "Hard Edge": "canny",
        "Normal Map": "normal",
        "Segmentation": "segment",
        "Tile": "tile",
        "Inpaint": "repaint",
    }
)
ALIASES = {"input_image": "image", "mask_image": "mask", "guidance": "guidance_end"}


class Unit(BaseModel):
    """A unit as webuiapi's ControlNetUnit writes it; what is no field here is not looked at."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    enabled: bool = True
    module: str | None = None
    model: str | None = None
    weight: float = 1.0
    image: Any = Field(default=None, repr=False)
    mask: Any = Field(default=None, repr=False)
    resize_mode: int | str = 1
    threshold_a: float | None = None
    threshold_b: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: int | str = 0
    hr_option: str = "Both"
    union_control_type: str = UNKNOWN
    effective_region_mask: str | None = Field(default=None, repr=False)
    advanced_weighting: Any = Field(default=None, repr=False)
    ipadapter_input: Any = Field(default=None, repr=False)


def unit_of(given: Any) -> Unit:
    """Read a unit. Raises BadRequestError for what is none."""
    if not isinstance(given, Mapping):
        raise refused("has a unit that is no object of fields")
    fields = {ALIASES.get(name, name): value for name, value in given.items()}
    try:
        return Unit.model_validate({n: v for n, v in fields.items() if v is not None})
    except ValidationError as error:
        raise invalid(error.errors()) from None


def type_of_unit(unit: Unit) -> str | None:
    """Return what a unit's picture is, of a union of ControlNets. Raises BadRequestError."""
    if unit.union_control_type in (UNKNOWN, ""):
        return None
    if unit.union_control_type not in UNION_TYPES:
        raise refused(
            f"has the union_control_type {unit.union_control_type[:40]!r}; choose one of "
            f"{', '.join(UNION_TYPES)}"
        )
    return UNION_TYPES[unit.union_control_type]


def pictures_of_unit(unit: Unit) -> tuple[bytes | None, bytes | None]:
    """Return a unit's picture and mask: texts, a pair of texts, or an object of both."""
    image, mask = unit.image, unit.mask
    if isinstance(image, list) and len(image) == 1:
        (image,) = image
    if isinstance(image, list) and len(image) == 2:
        image, mask = image
    if isinstance(image, Mapping):
        image, mask = (image.get(name) for name in ("image", "mask"))
    read = list[bytes | None]()
    for each in (image, mask):
        if not isinstance(each, str | None):
            raise refused("has a picture that is no text; send base64 of a file")
        read.append(read_base64(PARAM, each) if each else None)
    return read[0], read[1]


def refused(why: str) -> BadRequestError:
    """Return the error for a unit that asks for what is not done here."""
    return BadRequestError(f"{PARAM} {why}", code="not_supported", param=PARAM)
