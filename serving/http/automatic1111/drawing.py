"""From the bodies of txt2img and img2img to requests; what cannot be done is said in a sentence."""

from collections.abc import Mapping
from typing import Any

from runtime.images.upscaling import Hires
from runtime.request import MASKED, WHOLE
from serving.errors import BadRequestError, NotFoundError
from serving.http.automatic1111.controlnet import steering_of
from serving.http.automatic1111.fields import DrawingBody, ImageBody, TextBody
from serving.http.automatic1111.names import method, upscaler
from serving.http.automatic1111.settings import NOISES, Settings
from serving.http.fields import Catalog, check_whole, file_format
from serving.limits import Limits
from serving.picture_request import PictureRequest
from serving.uploads import read_base64, size_of

STRENGTH = 0.75  # where no denoising_strength is given
MASK_BLUR = 4.0
FILL, ORIGINAL = 0, 1  # of inpainting_fill
STRETCH, CROP, PAD = 0, 1, 2  # of resize_mode
WITH_ETA = ("ddim", "tcd")
WITH_NOISE = (
    *("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"),
    "euler_a_cfg_pp",
)  # samplers whose eta is 1 here
SAME = (None, "", "Use same checkpoint", "Use same sampler", "Use same scheduler")
# What is not done here: the values that ask for nothing, and why there is no more.
NOT_DONE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "restore_faces": ((False,), "no model here restores faces"),
    "script_name": (("", "None"), "there are no scripts here"),
    "s_min_uncond": ((0,), "no step is left unguided here"),
    "s_churn": ((0,), "samplers add no noise of their own here"),
    "s_noise": ((1,), "samplers do not scale their noise here"),
    "seed_resize_from_w": ((0, -1), "noise is not resized here"),
    "seed_resize_from_h": ((0, -1), "noise is not resized here"),
    "refiner_checkpoint": (("", "None"), "one model draws a picture here"),
    "disable_extra_networks": ((False,), "a prompt without adapters is one that names none"),
    "latent_mask": (("",), "send mask instead"),
    "mask_round": ((True,), "a mask has no half-tones here"),
    "initial_noise_multiplier": ((1,), "noise is not scaled here"),
}
NOT_DONE_IN_HIRES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "firstphase_width": ((0,), "give width and hr_scale"),
    "firstphase_height": ((0,), "give height and hr_scale"),
}


def text_request(
    body: TextBody, settings: Settings, limits: Limits, catalog: Catalog
) -> PictureRequest:
    """Return what txt2img asks for. Raises RefusalError or RequestError."""
    fields = _fields(body, settings, limits)
    if body.enable_hr:
        fields["hires"] = _hires(body, fields, limits, catalog)
    steering = steering_of(body, catalog, limits, None, None)
    return _request(fields, settings, catalog, **steering).checked(limits)


def image_request(
    body: ImageBody, settings: Settings, limits: Limits, catalog: Catalog
) -> PictureRequest:
    """Return what img2img asks for. Raises RefusalError or RequestError."""
    fields = _fields(body, settings, limits)
    fields["strength"] = _given(body.denoising_strength, STRENGTH)
    image = _image(body)
    _check_shape(body, image, limits)
    drawn: dict[str, Any] = {"image": image}
    if body.mask:
        drawn["mask"] = read_base64("mask", body.mask)
        drawn["mask_inverted"] = bool(body.inpainting_mask_invert)
        drawn["fill_masked"] = _fills(body)
        fields |= _inpainting(body)
    drawn |= steering_of(body, catalog, limits, image, drawn.get("mask"))
    return _request(fields, settings, catalog, **drawn).checked(limits)


def _request(
    fields: dict[str, Any], settings: Settings, catalog: Catalog, **drawn: Any
) -> PictureRequest:
    return PictureRequest(
        **catalog.hires(fields),
        model=settings.sd_model_checkpoint,
        preview_every=settings.preview_every,
        format=file_format(settings.samples_format, "samples_format"),
        quality=settings.jpeg_quality,
        **drawn,
    )


def _fields(body: DrawingBody, settings: Settings, limits: Limits) -> dict[str, Any]:
    """Return what both have in common, by the runtime's names; what is left out is not there."""
    _refuse(body, NOT_DONE)
    sampler, schedule = method(body.sampler_name or body.sampler_index, body.scheduler)
    counts = [
        check_whole(name, _given(getattr(body, name), 1), 1, limits.pictures)
        for name in ("batch_size", "n_iter")
    ]
    fields = {
        "negative_prompt": body.negative_prompt,
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "sampler": sampler,
        "schedule": schedule,
        "width": body.width,
        "height": body.height,
        "seed": _seed(body.seed),
        "seamless": "both" if body.tiling else None,
        "eta": _eta(sampler, body.eta),
    }
    if body.subseed_strength:
        fields["variation_strength"] = body.subseed_strength
        fields["variation_seed"] = _seed(body.subseed)
    return {
        "prompt": body.prompt or "",
        "num_images_per_prompt": counts[0] * counts[1],
        "noise": NOISES[settings.randn_source],
        "clip_skip": settings.CLIP_stop_at_last_layers,
        **{name: value for name, value in fields.items() if value is not None},
    }


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _seed(seed: int | None) -> int | None:
    return None if seed == -1 else seed


def _eta(sampler: str | None, eta: float | None) -> float | None:
    """Return the eta of a sampler that has one; one that could not be kept is refused."""
    if sampler in WITH_NOISE and eta not in (None, 1):
        raise BadRequestError(f"eta is {eta}; that of {sampler} is 1 here", param="eta")
    return eta if sampler in WITH_ETA else None


def _refuse(body: DrawingBody, refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for name, (harmless, why) in refused.items():
        value = getattr(body, name, None)
        if value is not None and value not in harmless:
            raise BadRequestError(
                f"{name} is {str(value)[:60]!r}; {why}", code="not_supported", param=name
            )


def _hires(
    body: TextBody, fields: Mapping[str, Any], limits: Limits, catalog: Catalog
) -> dict[str, Any]:
    """Return the fields of `Hires`."""
    _refuse(body, NOT_DONE_IN_HIRES)
    same = {
        "hr_checkpoint_name": (),
        "hr_sampler_name": (body.sampler_name, body.sampler_index),
        "hr_scheduler": (body.scheduler,),
        "hr_prompt": (body.prompt,),
        "hr_negative_prompt": (body.negative_prompt,),
    }
    for name, first in same.items():
        if getattr(body, name) not in (*SAME, *first):
            raise BadRequestError(
                f"{name} differs from the first pass; both are the same here, so leave it out",
                code="not_supported",
                param=name,
            )
    hires = Hires(
        scale=_scale(body, fields, limits),
        strength=_given(body.denoising_strength, STRENGTH),
        num_inference_steps=body.hr_second_pass_steps or None,
    )
    given = {name: getattr(hires, name) for name in Hires.__slots__}
    return {**given, "upscaler": upscaler(body.hr_upscaler, catalog)}


def _scale(body: TextBody, fields: Mapping[str, Any], limits: Limits) -> float:
    """Return by what hires fix enlarges: hr_scale, or what leads to the size that is given."""
    scales = []
    for wanted, side in (("hr_resize_x", "width"), ("hr_resize_y", "height")):
        pixels = getattr(body, wanted)
        if not pixels:
            continue
        if not fields.get(side):
            raise BadRequestError(f"{wanted} came without {side}; give both", param=wanted)
        most = limits.side
        scales.append(
            check_whole(wanted, pixels, 1, most) / check_whole(side, fields[side], 1, most)
        )
    if len(scales) == 2 and abs(scales[0] - scales[1]) > 0.01 * scales[0]:
        raise BadRequestError(
            "hr_resize_x and hr_resize_y have another shape than width and height; nothing is "
            "cut off here, so give one of them, or hr_scale",
            param="hr_resize_x",
        )
    return float(scales[0] if scales else _given(body.hr_scale, 2.0))


def _image(body: ImageBody) -> bytes:
    """Return the picture to start from."""
    images = body.init_images or []
    if not images:
        raise NotFoundError(
            "init_images is missing; send the picture to begin with", param="init_images"
        )
    if any(image != images[0] for image in images):
        raise BadRequestError(
            "init_images has several pictures; send a request for each", param="init_images"
        )
    return read_base64("init_images", images[0])


def _check_shape(body: ImageBody, image: bytes, limits: Limits) -> None:
    """Refuse to cut or pad a picture of another shape than the result."""
    mode = check_whole("resize_mode", _given(body.resize_mode, STRETCH), STRETCH, PAD)
    if mode == STRETCH or not body.width or not body.height:
        return
    width, height = size_of("init_images", image, limits.upload_pixels)
    if abs(width * body.height - height * body.width) > max(width, height):
        raise BadRequestError(
            f"resize_mode is {mode}, and the picture of {width} x {height} pixels is neither cut "
            f"nor padded to {body.width} x {body.height} here; give 0, or a picture of that shape",
            code="not_supported",
            param="resize_mode",
        )


def _fills(body: ImageBody) -> bool:
    """Return whether the masked part begins as its blurred surroundings."""
    fill = check_whole("inpainting_fill", _given(body.inpainting_fill, FILL), 0, 3)
    if fill not in (FILL, ORIGINAL):
        raise BadRequestError(
            f"inpainting_fill is {fill}; 0 (fill) and 1 (original) are done here",
            code="not_supported",
            param="inpainting_fill",
        )
    return fill == FILL


def _inpainting(body: ImageBody) -> dict[str, Any]:
    """Return how the masked part is drawn."""
    blurs = {body.mask_blur, body.mask_blur_x, body.mask_blur_y} - {None}
    if body.mask_blur is not None:
        blurs = {body.mask_blur}  # it stands for both
    if len(blurs) > 1:
        raise BadRequestError(
            "mask_blur_x and mask_blur_y differ; one blur is for both here", param="mask_blur_x"
        )
    fields: dict[str, Any] = {"mask_blur": next(iter(blurs), MASK_BLUR), "inpaint_area": WHOLE}
    if body.inpaint_full_res is not False:
        fields |= {"inpaint_area": MASKED, "mask_padding": body.inpaint_full_res_padding or 0}
    return fields
