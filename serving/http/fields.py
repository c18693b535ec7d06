"""What a server's requests may name, and the requests that bodies make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import choice, nearest
from runtime.images.upscaling import UPSCALERS
from serving.engine_settings import EngineSettings
from serving.enlarging_request import LANCZOS, EnlargingRequest
from serving.errors import BadRequestError, NotFoundError
from serving.http.bodies import ImagePromptFields, OpenAIFields, Picture, Upscaling
from serving.limits import Limits
from serving.picture_request import PictureRequest
from serving.steering import ControlRequest, ImagePromptRequest, RegionRequest
from serving.uploads import read_base64


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What requests may name, the first model being the one that they need not name."""

    models: tuple[str, ...]
    loras: tuple[str, ...]
    controls: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    upscalers: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: EngineSettings) -> Self:
        """Return what an engine's settings name."""
        return cls(
            models=tuple(settings.models),
            loras=tuple(settings.loras),
            controls=tuple(settings.controls),
            ip_adapters=tuple(settings.ip_adapters),
            upscalers=tuple(settings.upscalers),
        )

    def model(self, name: str | None) -> str:
        """Return a model's name. Raises NotFoundError for one that the operator did not list."""
        if name is None:
            return self.models[0]
        if name not in self.models:
            raise NotFoundError(
                f"there is no model {name[:100]!r}; {_hint(name, self.models)}/v1/models lists "
                "those of this server",
                code="model_not_found",
                param="model",
            )
        return name

    def adapters(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return adapters in one order. Raises NotFoundError, BadRequestError for a weight."""
        for name, weight in given.items():
            if name not in self.loras:
                raise NotFoundError(
                    f"there is no adapter {name[:100]!r} on this server; "
                    f"{_hint(name, self.loras)}/api/v1/capabilities lists those that there are",
                    code="lora_not_found",
                    param="loras",
                )
            if not -100 <= weight <= 100:
                raise BadRequestError(f"the weight of {name} is not -100 to 100", param="loras")
        return tuple(sorted(given.items()))

    def control(self, name: str, param: str = "controls") -> str:
        """Return a ControlNet's name. Raises NotFoundError for one that is not here."""
        if name not in self.controls:
            raise NotFoundError(
                f"there is no control {name[:100]!r} on this server; "
                f"{_hint(name, self.controls)}/api/v1/capabilities lists those that there are",
                code="control_not_found",
                param=param,
            )
        return name

    def ip_adapter(self, name: str, param: str = "image_prompts") -> str:
        """Return an IP-Adapter's name. Raises NotFoundError for one that is not here."""
        if name not in self.ip_adapters:
            raise NotFoundError(
                f"there is no IP-Adapter {name[:100]!r} on this server; "
                f"{_hint(name, self.ip_adapters)}/api/v1/capabilities lists those that there are",
                code="ip_adapter_not_found",
                param=param,
            )
        return name

    def upscaler(self, name: str, param: str = "upscaler") -> str:
        """Return an upscaler's name. Raises NotFoundError for one that is not here."""
        if name not in self.upscalers:
            raise NotFoundError(
                f"there is no upscaler {name[:100]!r} on this server; "
                f"{_hint(name, self.upscalers)}/api/v1/capabilities lists those that there are",
                code="upscaler_not_found",
                param=param,
            )
        return name

    def hires(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return a request's fields, and the operator's upscaler that its hires fix names apart.

        Raises NotFoundError.
        """
        hires = fields.get("hires")
        if hires is None or hires["upscaler"] in UPSCALERS:
            return {"fields": fields}
        named = self.upscaler(hires["upscaler"], "hires")
        return {
            "fields": {**fields, "hires": {**hires, "upscaler": LANCZOS}},
            "hires_upscaler": named,
        }

    def steering(self, body: Picture | OpenAIFields) -> dict[str, Any]:
        """Return what steers a body's pictures. Raises NotFoundError, BadRequestError."""
        return {
            "controls": tuple(
                ControlRequest(
                    net=self.control(each.name),
                    picture=read_base64("controls", each.picture),
                    **each.model_dump(exclude={"name", "picture"}),
                )
                for each in body.controls
            ),
            "regions": tuple(
                RegionRequest(
                    prompt=each.prompt, mask=read_base64("regions", each.mask), weight=each.weight
                )
                for each in body.regions
            ),
            "image_prompts": tuple(self._image_prompt(each) for each in body.image_prompts),
        }

    def _image_prompt(self, given: ImagePromptFields) -> ImagePromptRequest:
        name = "image_prompts"
        several = [given.picture] if isinstance(given.picture, str) else given.picture
        return ImagePromptRequest(
            adapter=self.ip_adapter(given.name),
            pictures=tuple(read_base64(name, each) for each in several),
            mask=None if given.mask is None else read_base64(name, given.mask),
            scale=given.scale,
            start=given.start,
            end=given.end,
        )


def _hint(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near!r}? " if near else ""


FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}


def file_format(name: str, param: str) -> str:
    """Return Pillow's name of a format. Raises BadRequestError."""
    if name.lower() not in FORMATS:
        said = choice(name, ("png", "jpeg", "webp"))
        raise BadRequestError(f"{param} is {name[:40]!r}; {said}", param=param)
    return FORMATS[name.lower()]


def _file(body: Picture | Upscaling) -> dict[str, Any]:
    """Return the format and the quality of what a body asks for. Raises BadRequestError."""
    kind = file_format(body.format, "format")
    if body.quality is None:
        return {"format": kind}
    if kind == "PNG":
        raise BadRequestError(
            "quality came without format jpeg or webp; a PNG keeps everything", param="quality"
        )
    return {"format": kind, "quality": check_whole("quality", body.quality, 1, 100)}


def check_whole(name: str, value: int, low: int, high: int) -> int:
    """Return a number that is within bounds. Raises BadRequestError."""
    if not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; give {low} to {high}", param=name)
    return value


def native_request(body: Picture, catalog: Catalog, limits: Limits) -> PictureRequest:
    """Return what a body of the native API requests, checked. Raises RefusalError, RequestError."""
    fields = {"prompt": body.prompt, **body.of_request()}
    if body.num_images_per_prompt is not None:
        fields["num_images_per_prompt"] = body.num_images_per_prompt
    check_whole("priority", body.priority, -10, 10)
    picture_request = PictureRequest(
        **catalog.hires(fields),
        model=catalog.model(body.model),
        image=None if body.image is None else read_base64("image", body.image),
        mask=None if body.mask is None else read_base64("mask", body.mask),
        loras=catalog.adapters(body.loras),
        **catalog.steering(body),
        exact=body.exact,
        preview_every=check_whole("preview_every", body.preview_every, 0, limits.steps),
        **_file(body),
    )
    return picture_request.checked(limits)


def upscaling_request(body: Upscaling, catalog: Catalog, limits: Limits) -> EnlargingRequest:
    """Return what a body wants enlarged, checked. Raises RefusalError."""
    check_whole("priority", body.priority, -10, 10)
    return EnlargingRequest(
        image=read_base64("image", body.image),
        upscaler=body.upscaler if body.upscaler == LANCZOS else catalog.upscaler(body.upscaler),
        factor=body.factor,
        **_file(body),
    ).checked(limits)
