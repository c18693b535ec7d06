"""sd-webui-controlnet's part of Automatic1111's API: units of a request, and lists.

Facts of its `internal_controlnet/args.py`, `scripts/api.py` and `scripts/preprocessor`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.control import NONE
from serving.errors import BadRequestError
from serving.http.automatic1111.fields import DrawingBody
from serving.http.documents import REFUSALS, invalid
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.steering import ControlRequest
from serving.uploads import read_base64, size_of

__all__ = ["SCRIPT", "control_requests", "controlnet_routes"]

SCRIPT = "controlnet"
VERSION = 3
PARAM = "alwayson_scripts"
# Names of preprocessors, with ours: its option that threshold_a, then threshold_b is, the bounds
# beyond which its own default counts, and that default.
Options = Sequence[tuple[str, float, float, float]]
MODULES: Mapping[str, tuple[str, Options]] = {
    "none": (NONE, ()),
    "canny": ("canny", (("low", 0, 256, 100), ("high", 0, 256, 200))),
    "scribble_xdog": ("scribble", (("threshold", 1, 64, 32),)),
    "tile_resample": ("tile", (("factor", 1, 8, 1),)),
    "blur_gaussian": ("blur", (("sigma", 0.1, 64, 9),)),
}
INPAINT = ("inpaint_only", "inpaint", "inpaint_global_harmonious")
WHOLE_NUMBERS = ("threshold",)
MODES = ("Balanced", "My prompt is more important", "ControlNet is more important")
OURS = ("balanced", "prompt", "control")  # in the same order
STRETCH, CROP, FILL = range(3)
RESIZE: Mapping[str, int] = {
    "Just Resize": STRETCH,
    "Crop and Resize": CROP,
    "Inner Fit (Scale to Fit)": CROP,
    "Scale to Fit (Inner Fit)": CROP,
    "Resize and Fill": FILL,
    "Outer Fit (Shrink to Fit)": FILL,
    "Envelope (Outer Fit)": FILL,
}
ALIASES = {"input_image": "image", "mask_image": "mask", "guidance": "guidance_end"}
BOTH_RUNS = "Both"


class Unit(BaseModel):
    """A control as webuiapi's ControlNetUnit writes it; what is no field here is not looked at."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    enabled: bool = True
    module: str | None = None
    model: str | None = None
    weight: float = 1.0
    image: Any = Field(default=None, repr=False)
    mask: Any = Field(default=None, repr=False)
    resize_mode: int | str = CROP
    threshold_a: float | None = None
    threshold_b: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: int | str = 0
    hr_option: str = BOTH_RUNS


def control_requests(
    body: DrawingBody, catalog: Catalog, limits: Limits, image: bytes | None, mask: bytes | None
) -> tuple[ControlRequest, ...]:
    """Return the controls among a body's scripts, of which there are no others.

    image, mask: what is drawn over, which a unit without a picture sees
    Raises RefusalError, and BadRequestError for a unit that is none.
    """
    units = list[Any]()
    for name, given in (body.alwayson_scripts or {}).items():
        if name.lower() != SCRIPT:
            raise BadRequestError(
                f"{PARAM} names {name[:60]!r}; ControlNet is the only script here, so leave it out",
                param=PARAM,
            )
        args = given.get("args", []) if isinstance(given, Mapping) else given
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise _refused("has args that are no list of units")
        units += args
    made = (_control(each, body, catalog, limits, image, mask) for each in units if each)
    return tuple(control for control in made if control is not None)


def _control(
    given: Any,
    body: DrawingBody,
    catalog: Catalog,
    limits: Limits,
    image: bytes | None,
    mask: bytes | None,
) -> ControlRequest | None:
    unit = _unit(given)
    if not unit.enabled or (unit.model or "None") == "None":
        return None
    if unit.hr_option not in (BOTH_RUNS, ""):
        raise _refused(f"has the hr_option {unit.hr_option[:40]!r}; both runs are steered here")
    seen, covered = _pictures(unit)
    picture = image if seen is None else seen
    if picture is None:
        raise _refused("has a unit without image; send the picture that the net is to see")
    module = unit.module or NONE
    inpaints = module.lower() in INPAINT
    covered = (mask if covered is None else covered) if inpaints else None
    if inpaints and covered is None:
        raise _refused(f"has the module {module} without a mask; send what is painted in white")
    _check_shape(unit, body, size_of(PARAM, picture, limits.upload_pixels))
    return ControlRequest(
        net=_net(str(unit.model), catalog),
        picture=picture,
        mask=covered,
        weight=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        mode=_mode(unit.control_mode),
        preprocessor=None if inpaints else _preprocessor(module, unit),
    )


def _unit(given: Any) -> Unit:
    if not isinstance(given, Mapping):
        raise _refused("has a unit that is no object of fields")
    fields = {ALIASES.get(name, name): value for name, value in given.items()}
    try:
        return Unit.model_validate({n: v for n, v in fields.items() if v is not None})
    except ValidationError as error:
        raise invalid(error.errors()) from None


def _pictures(unit: Unit) -> tuple[bytes | None, bytes | None]:
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
            raise _refused("has a picture that is no text; send base64 of a file")
        read.append(read_base64(PARAM, each) if each else None)
    return read[0], read[1]


def _net(title: str, catalog: Catalog) -> str:
    """Return the net that a title means, "name" or "name [hash]". Raises NotFoundError."""
    return catalog.control(title.partition(" [")[0].strip(), PARAM)


def _mode(given: int | str) -> str:
    for number, (name, ours) in enumerate(zip(MODES, OURS, strict=True)):
        if given in (number, name):
            return ours
    raise _refused(f"has the control_mode {str(given)[:40]!r}; choose one of {', '.join(MODES)}")


def _preprocessor(module: str, unit: Unit) -> str | None:
    """Return a module as ours is written, with its numbers. Raises BadRequestError."""
    if module.lower() not in MODULES:
        raise _refused(
            f"has the module {module[:60]!r}; choose one of {', '.join((*MODULES, *INPAINT))}, or "
            "send the finished hint with none"
        )
    name, options = MODULES[module.lower()]
    numbers = list[str]()
    for (option, low, high, default), value in zip(
        options, (unit.threshold_a, unit.threshold_b), strict=False
    ):
        chosen = default if value is None or not low <= value <= high else value
        numbers.append(f"{option}={int(chosen) if option in WHOLE_NUMBERS else chosen}")
    if name == NONE:
        return None
    return f"{name}:{','.join(numbers)}" if numbers else name


def _check_shape(unit: Unit, body: DrawingBody, size: tuple[int, int]) -> None:
    """Refuse to cut or fill a picture of another shape than what is drawn."""
    mode = RESIZE.get(unit.resize_mode) if isinstance(unit.resize_mode, str) else unit.resize_mode
    if mode not in (STRETCH, CROP, FILL):
        raise _refused(
            f"has the resize_mode {str(unit.resize_mode)[:40]!r}; choose one of {', '.join(RESIZE)}"
        )
    if mode == STRETCH or not body.width or not body.height:
        return
    width, height = size
    if abs(width * body.height - height * body.width) > max(width, height):
        raise _refused(
            f"has a picture of {width} x {height} pixels, which is neither cut nor filled up to "
            f"{body.width} x {body.height} here; give the resize_mode 0, or a picture of that shape"
        )


def _refused(why: str) -> BadRequestError:
    return BadRequestError(f"{PARAM} {why}", code="not_supported", param=PARAM)


def controlnet_routes(catalog: Catalog, limits: Limits) -> APIRouter:
    """Return the routes of /controlnet, which list."""
    router = APIRouter(prefix="/controlnet", tags=["Automatic1111"], responses=REFUSALS)
    modules = [*MODULES, *INPAINT]

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Say which version of the extension this is like."""
        return {"version": VERSION}

    @router.get("/model_list")
    async def models() -> dict[str, list[str]]:
        """List the ControlNets of this server."""
        return {"model_list": list(catalog.controls)}

    @router.get("/module_list")
    async def list_modules() -> dict[str, Any]:
        """List the preprocessors, and the bounds of their numbers."""
        details = {name: _detail(MODULES.get(name, ("", ()))[1]) for name in modules}
        return {"module_list": modules, "module_detail": details}

    @router.get("/control_types")
    async def types() -> dict[str, Any]:
        """List one type of controls, that of all."""
        every = {
            "module_list": modules,
            "model_list": ["None", *catalog.controls],
            "default_option": NONE,
            "default_model": "None",
        }
        return {"control_types": {"All": every}}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        """Say how many controls a request may have."""
        return {"control_net_unit_count": limits.controls}

    return router


def _detail(options: Options) -> dict[str, Any]:
    sliders = [
        {"name": option, "min": low, "max": high, "value": value}
        for option, low, high, value in options
    ]
    return {"model_free": False, "sliders": sliders}
