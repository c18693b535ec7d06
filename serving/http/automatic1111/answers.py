"""What Automatic1111's API answers: pictures with their `info`, texts of files, progress."""

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from runtime.images.a1111 import SAMPLER_LABELS
from runtime.images.a1111_reader import parameter_fields
from runtime.images.exif import texts_of
from runtime.images.files import program_version
from serving.http.automatic1111.fields import DrawingBody, ImageBody
from serving.http.automatic1111.settings import Settings
from serving.jobs import DrawnPicture, Job
from serving.uploads import read_base64, size_of

LEAST_PROGRESS = 0.01  # of a job that has begun: 0 says that there is none
PARAMETERS = "parameters"


def drawn(body: DrawingBody, job: Job, pictures: Sequence[DrawnPicture]) -> dict[str, Any]:
    """Return the answer of txt2img and img2img: the pictures that are there, and `info`.

    The pictures that were sent are not among the parameters unless they are asked for, and what is
    no option here is never.
    """
    finished = [(index, picture) for index, picture in enumerate(pictures) if picture.data]
    given = body.override_settings or {}
    overrides = {name: given[name] for name in Settings.model_fields if name in given}
    parameters = {**body.model_dump(), "override_settings": overrides, "alwayson_scripts": {}}
    if isinstance(body, ImageBody) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    sent = body.send_images is not False
    return {
        "images": [base64.b64encode(picture.data).decode() for _, picture in finished if sent],
        "parameters": parameters,
        "info": json.dumps(_info(body, job, finished)),
    }


def _info(
    body: DrawingBody, job: Job, finished: Sequence[tuple[int, DrawnPicture]]
) -> dict[str, Any]:
    """Return what Automatic1111's `Processed` says, of the pictures that are there."""
    fields = job.picture_request.fields
    settings: Mapping[str, Any] = finished[0][1].settings if finished else {}
    first, count = (finished[0][0] if finished else 0), len(finished)
    seeds = [fields["seed"][index] for index, _ in finished]
    subseeds = fields.get("variation_seed") or [-1] * job.picture_request.count
    sampler = str(settings.get("sampler") or fields.get("sampler") or "")
    prompt, negative = fields["prompt"], fields.get("negative_prompt", "")
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": fields["seed"][first],
        "all_seeds": seeds,
        "subseed": subseeds[first],
        "all_subseeds": [subseeds[index] for index, _ in finished],
        "subseed_strength": fields.get("variation_strength", 0),
        "width": settings.get("width", fields.get("width")),
        "height": settings.get("height", fields.get("height")),
        "sampler_name": SAMPLER_LABELS.get(sampler, sampler),
        "cfg_scale": settings.get("guidance_scale", fields.get("guidance_scale")),
        "steps": settings.get("num_inference_steps", fields.get("num_inference_steps")),
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.picture_request.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [_texts(picture.data).get(PARAMETERS, "") for _, picture in finished],
        "styles": body.styles or [],
        "job_timestamp": _timestamp(),
        "clip_skip": fields["clip_skip"],
        "is_using_inpainting_conditioning": False,
        "version": f"latentrt {program_version()}",
    }


def png_info(image: str, most_pixels: int) -> dict[str, Any]:
    """Return what a picture's file says of itself. Raises BadRequestError or TooLargeError."""
    if not image.strip():
        return {"info": "", "items": {}, "parameters": {}}
    data = read_base64("image", image.strip())
    size_of("image", data, most_pixels)
    texts = _texts(data)
    info = texts.pop(PARAMETERS, "")
    return {"info": info, "items": texts, "parameters": parameter_fields(info)}


def _texts(data: bytes) -> dict[str, str]:
    """Return the texts of a file whose header was read before, {} if it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return texts_of(image)
    except Exception:  # Pillow raises many kinds for broken files
        return {}


def progress(jobs: Sequence[Job], now: float, *, with_image: bool) -> dict[str, Any]:
    """Return how far a caller's unfinished jobs are, all together; they are in order.

    now: of the clock that the jobs were made by
    """
    pictures = [picture for job in jobs for picture in job.pictures]
    done = sum(1 for picture in pictures if picture.data)
    current = next((picture for picture in pictures if not picture.data), DrawnPicture())
    share = eta = 0.0
    if pictures:
        shares = [1.0 if p.data else p.calls / max(p.total, 1) for p in pictures]
        share = min(max(sum(shares) / len(shares), LEAST_PROGRESS), 1.0)
        elapsed = now - jobs[0].created
        eta = elapsed / share - elapsed
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "drawing" if pictures else "",
        "job_count": len(pictures),
        "job_timestamp": _timestamp() if pictures else "0",
        "job_no": done,
        "sampling_step": current.calls,
        "sampling_steps": current.total,
    }
    return {
        "progress": share,
        "eta_relative": eta,
        "state": state,
        "current_image": _preview(jobs) if with_image else None,
        "textinfo": None,
    }


def _preview(jobs: Sequence[Job]) -> str | None:
    """Return the newest preview of the oldest job that has one, a JPEG in base64."""
    for job in jobs:
        for event in reversed(job.events):
            if event.name == "preview" and event.blob:
                return base64.b64encode(event.blob).decode()
    return None


def _timestamp() -> str:
    return time.strftime("%Y%m%d%H%M%S")
