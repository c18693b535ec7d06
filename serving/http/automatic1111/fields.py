"""The bodies of Automatic1111's API. What is not a field here is not looked at, as there."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class DrawingBody(BaseModel):
    """What txt2img and img2img have in common; null is as good as nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str | None = None
    negative_prompt: str | None = None
    styles: list[str] | None = None
    seed: int | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    eta: float | None = None
    denoising_strength: float | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_noise: float | None = None
    refiner_checkpoint: str | None = None
    disable_extra_networks: bool | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = None


class TextBody(DrawingBody):
    """The body of txt2img."""

    enable_hr: bool | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None


class ImageBody(DrawingBody):
    """The body of img2img; pictures are base64 of a PNG, JPEG or WebP file, or a data URL of it."""

    init_images: list[str] | None = Field(default=None, repr=False)
    mask: str | None = Field(default=None, repr=False)
    latent_mask: str | None = Field(default=None, repr=False)
    resize_mode: int | None = None
    mask_blur: float | None = None
    mask_blur_x: float | None = None
    mask_blur_y: float | None = None
    mask_round: bool | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: int | None = None
    initial_noise_multiplier: float | None = None
    include_init_images: bool | None = None


class ExtrasBody(BaseModel):
    """What extra-single-image and extra-batch-images have in common."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    resize_mode: int | None = None
    upscaling_resize: float | None = None
    upscaling_resize_w: int | None = None
    upscaling_resize_h: int | None = None
    upscaling_crop: bool | None = None
    upscaler_1: str | None = None
    upscaler_2: str | None = None
    extras_upscaler_2_visibility: float | None = None
    gfpgan_visibility: float | None = None
    codeformer_visibility: float | None = None


class ExtraBody(ExtrasBody):
    """The body of extra-single-image."""

    image: str = Field(default="", repr=False)


class NamedPicture(BaseModel):
    """A picture of extra-batch-images, whose name is not looked at."""

    model_config = ConfigDict(extra="ignore")

    data: str = Field(repr=False)


class ExtraBatchBody(ExtrasBody):
    """The body of extra-batch-images."""

    image_list: list[NamedPicture] = Field(default_factory=list, repr=False, alias="imageList")


class PngInfoBody(BaseModel):
    """The body of png-info."""

    model_config = ConfigDict(extra="ignore")

    image: str = Field(default="", repr=False)
