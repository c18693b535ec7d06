"""sd-webui-controlnet's part of Automatic1111's API: units of a request, and lists.

A unit whose model is an IP-Adapter is an image prompt, as in `image_prompts` beside it.
Facts of its `internal_controlnet/args.py`, `scripts/api.py` and `scripts/preprocessor`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter

from engine.errors import choice
from runtime.control import NONE
from serving.errors import BadRequestError
from serving.http.automatic1111.fields import DrawingBody
from serving.http.automatic1111.image_prompts import IP_MODULES, image_prompt_of, is_ip_adapter
from serving.http.automatic1111.units import (
    PARAM,
    Unit,
    pictures_of_unit,
    refused,
    type_of_unit,
    unit_of,
)
from serving.http.documents import REFUSALS
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.steering import ControlRequest, ImagePromptRequest
from serving.uploads import size_of

__all__ = ["SCRIPT", "controlnet_routes", "steering_of"]

SCRIPT = "controlnet"
VERSION = 3
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
BOTH_RUNS = "Both"


def steering_of(
    body: DrawingBody, catalog: Catalog, limits: Limits, image: bytes | None, mask: bytes | None
) -> dict[str, Any]:
    """Return the controls and image prompts among a body's scripts, of which there are no others.

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
            raise refused("has args that are no list of units")
        units += args
    controls, prompts = list[ControlRequest](), list[ImagePromptRequest]()
    for unit in map(unit_of, filter(None, units)):
        if not unit.enabled or (unit.model or "None") == "None":
            continue
        if unit.hr_option not in (BOTH_RUNS, ""):
            raise refused(f"has the hr_option {unit.hr_option[:40]!r}; both runs are steered here")
        if is_ip_adapter(unit, catalog):
            prompts.append(image_prompt_of(unit, catalog, image))
        else:
            controls.append(_control(unit, body, catalog, limits, image, mask))
    return {"controls": tuple(controls), "image_prompts": tuple(prompts)}


def _control(
    unit: Unit,
    body: DrawingBody,
    catalog: Catalog,
    limits: Limits,
    image: bytes | None,
    mask: bytes | None,
) -> ControlRequest:
    seen, covered = pictures_of_unit(unit)
    picture = image if seen is None else seen
    if picture is None:
        raise refused("has a unit without its image; send the picture that the net is to see")
    module = unit.module or NONE
    inpaints = module.lower() in INPAINT
    covered = (mask if covered is None else covered) if inpaints else None
    if inpaints and covered is None:
        raise refused(f"has the module {module} without a mask; send what is painted in white")
    _check_shape(unit, body, size_of(PARAM, picture, limits.upload_pixels))
    return ControlRequest(
        net=_net(str(unit.model), catalog),
        picture=picture,
        mask=covered,
        weight=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        mode=_mode(unit.control_mode),
        type=type_of_unit(unit),
        preprocessor=None if inpaints else _preprocessor(module, unit),
    )


def _net(title: str, catalog: Catalog) -> str:
    """Return the net that a title means, "name" or "name [hash]". Raises NotFoundError."""
    return catalog.control(title.partition(" [")[0].strip(), PARAM)


def _mode(given: int | str) -> str:
    for number, (name, ours) in enumerate(zip(MODES, OURS, strict=True)):
        if given in (number, name):
            return ours
    raise refused(f"has the control_mode {str(given)[:40]!r}; {choice(given, MODES)}")


def _preprocessor(module: str, unit: Unit) -> str | None:
    """Return a module as ours is written, with its numbers. Raises BadRequestError."""
    if module.lower() not in MODULES:
        or_else = ", or send the finished hint with none"
        said = choice(module, (*MODULES, *INPAINT), or_else=or_else)
        raise refused(f"has the module {module[:60]!r}; {said}")
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
        said = choice(unit.resize_mode, RESIZE)
        raise refused(f"has the resize_mode {str(unit.resize_mode)[:40]!r}; {said}")
    if mode == STRETCH or not body.width or not body.height:
        return
    width, height = size
    if abs(width * body.height - height * body.width) > max(width, height):
        raise refused(
            f"has a picture of {width} x {height} pixels, which is neither cut nor filled up to "
            f"{body.width} x {body.height} here; give the resize_mode 0, or a picture of that shape"
        )


def controlnet_routes(catalog: Catalog, limits: Limits) -> APIRouter:
    """Return the routes of /controlnet, which list."""
    router = APIRouter(prefix="/controlnet", tags=["Automatic1111"], responses=REFUSALS)
    seeing = list(IP_MODULES) if catalog.ip_adapters else []
    modules, nets = [*MODULES, *INPAINT, *seeing], [*catalog.controls, *catalog.ip_adapters]

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Say which version of the extension this is like."""
        return {"version": VERSION}

    @router.get("/model_list")
    async def models() -> dict[str, list[str]]:
        """List the ControlNets and IP-Adapters of this server."""
        return {"model_list": nets}

    @router.get("/module_list")
    async def list_modules() -> dict[str, Any]:
        """List the preprocessors, and the bounds of their numbers."""
        details = {name: _detail(MODULES.get(name, ("", ()))[1]) for name in modules}
        return {"module_list": modules, "module_detail": details}

    @router.get("/control_types")
    async def types() -> dict[str, Any]:
        """List the types of units: all, and IP-Adapters where there are some."""
        types = {"All": _type(modules, nets)}
        if seeing:
            types["IP-Adapter"] = _type(seeing, catalog.ip_adapters)
        return {"control_types": types}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        """Say how many controls a request may have."""
        return {"control_net_unit_count": limits.controls}

    return router


def _type(modules: Sequence[str], nets: Sequence[str]) -> dict[str, Any]:
    return {
        "module_list": list(modules),
        "model_list": ["None", *nets],
        "default_option": NONE if NONE in modules else modules[0],
        "default_model": "None",
    }


def _detail(options: Options) -> dict[str, Any]:
    sliders = [
        {"name": option, "min": low, "max": high, "value": value}
        for option, low, high, value in options
    ]
    return {"model_free": False, "sliders": sliders}
