"""From the bodies of Automatic1111's extras to requests that enlarge."""

from collections.abc import Sequence

from serving.enlarging_request import LANCZOS, UNCHANGED, EnlargingRequest
from serving.errors import BadRequestError
from serving.http.automatic1111.fields import ExtrasBody
from serving.http.automatic1111.names import UPSCALERS, trained_upscaler
from serving.http.automatic1111.settings import Settings
from serving.http.fields import Catalog, check_whole, file_format
from serving.limits import Limits
from serving.uploads import read_base64

__all__ = ["extra_requests"]

BY_FACTOR, TO_SIZE = 0, 1  # of resize_mode
FACTOR, SIDE = 2.0, 512  # where they are left out, as there
NONE = (None, "", "None")


def extra_requests(
    body: ExtrasBody,
    images: Sequence[str],
    param: str,
    settings: Settings,
    catalog: Catalog,
    limits: Limits,
) -> list[EnlargingRequest]:
    """Return what each picture's enlarging asks for, checked; param: the field of the pictures.

    Raises RefusalError.
    """
    _refuse(body)
    check_whole(param, len(images), 1, limits.pictures)
    mode = check_whole("resize_mode", body.resize_mode or BY_FACTOR, BY_FACTOR, TO_SIZE)
    sides = [
        SIDE if side is None else side
        for side in (body.upscaling_resize_w, body.upscaling_resize_h)
    ]
    for name, side in zip(("upscaling_resize_w", "upscaling_resize_h"), sides, strict=True):
        check_whole(name, side, 1, limits.upscaled_pixels)
    factor = FACTOR if body.upscaling_resize is None else body.upscaling_resize
    return [
        EnlargingRequest(
            image=read_base64(param, image),
            upscaler=_upscaler(body.upscaler_1, catalog),
            factor=factor if mode == BY_FACTOR else None,
            size=sides if mode == TO_SIZE else None,
            crop=body.upscaling_crop is not False,
            format=file_format(settings.samples_format, "samples_format"),
            quality=settings.jpeg_quality,
        ).checked(limits)
        for image in images
    ]


def _upscaler(name: str | None, catalog: Catalog) -> str:
    if name in NONE:
        return UNCHANGED
    if str(name) in UPSCALERS:
        return LANCZOS
    return trained_upscaler(str(name), catalog, "upscaler_1", UPSCALERS)


def _refuse(body: ExtrasBody) -> None:
    """Refuse what is not done here. Raises BadRequestError."""
    asked = {
        "upscaler_2": body.upscaler_2 not in NONE and body.extras_upscaler_2_visibility,
        "gfpgan_visibility": body.gfpgan_visibility,
        "codeformer_visibility": body.codeformer_visibility,
    }
    why = {"upscaler_2": "one upscaler enlarges here"}
    for name, value in asked.items():
        if value:
            raise BadRequestError(
                f"{name} came; {why.get(name, 'no model here restores faces')}, so leave it out",
                code="not_supported",
                param=name,
            )
