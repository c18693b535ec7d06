"""What a server takes from a request: every size, and every product of sizes."""

from dataclasses import dataclass

MEGA = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request and of all together.

    body_bytes: of a request, counted while it is read; fields, files: of a form
    body_seconds: in which a body must have come
    upload_pixels: of a picture that is sent, by its header
    pictures: n; steps, side, pixels: of what is drawn, in each run
    prompt_characters, chunks: of a request's texts; a chunk is 77 tokens of the text encoder, and
        every version of a prompt that changes has its own
    parts: that AND joins, and regions with theirs; loras, controls: of a request
    image_prompts: pictures that a request attends to, all of its image prompts together
    upscaled_pixels: of a picture that was enlarged
    work: of a request, in steps of one guided picture of 512 by 512 pixels: each bound alone would
        let their product through
    jobs, queue_seconds: of all that is unfinished; more is refused with Retry-After
    streams: of events that one caller may read at once
    kept_bytes, kept_seconds: of finished pictures
    """

    body_bytes: int = 32 * MEGA
    fields: int = 64
    files: int = 4
    body_seconds: float = 60.0
    upload_pixels: int = 16_000_000
    pictures: int = 10
    steps: int = 150
    side: int = 2048
    pixels: int = 4 * MEGA
    prompt_characters: int = 32_000
    chunks: int = 64
    parts: int = 4
    loras: int = 8
    controls: int = 4
    image_prompts: int = 8
    upscaled_pixels: int = 16_777_216
    work: float = 10_000.0
    jobs: int = 64
    queue_seconds: float = 120.0
    streams: int = 16
    kept_bytes: int = 256 * MEGA
    kept_seconds: float = 600.0
