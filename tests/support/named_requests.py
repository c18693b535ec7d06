"""Named requests over all modes and samplers, and the hashes of their pixels.

    python tests/support/named_requests.py --backend cpu > after.txt     # in a checkout's folder

It runs in the folder of any checkout, so that a change that must change no picture can be held
against an older one: the two outputs are equal. Hashes hold for one machine and its libraries, so
none is kept. `--backend openvino` draws in float32 there.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path.cwd()))

from runtime import Hires, Pipeline

try:
    from engine.backends.settings import BackendSettings
except ImportError:  # older checkouts
    from engine.backends import BackendSettings

STEPS = 6
_ROWS, _COLUMNS = np.mgrid[0:128, 0:128]
IMAGE = Image.fromarray(
    np.stack([2 * _ROWS, 2 * _COLUMNS, 255 - _ROWS - _COLUMNS], axis=-1).astype(np.uint8)
)
MASK = Image.fromarray(np.where(_COLUMNS > 60, 255, 0).astype(np.uint8))
PAINTED = {"image": IMAGE, "mask": MASK}
LONG = "a red apple, " * 20
LORA = "with a LoRA"
REQUESTS = {
    "plain": {"sampler": "ddim"},
    "negative prompt": {"sampler": "ddpm", "negative_prompt": "blue, noto style"},
    "two pictures": {"sampler": "plms", "num_images_per_prompt": 2},
    "few steps": {"sampler": "lcm", "guidance_scale": 1.0, "num_inference_steps": 3},
    "noise added": {"sampler": "tcd", "eta": 0.3},
    "weights": {"sampler": "euler", "schedule": "karras", "prompt": "a (red:1.4) [apple] (hat)"},
    "a list": {"sampler": "euler_a", "prompt": ["a cat", "a dog"], "seed": [5, 9]},
    "image to image": {"sampler": "heun", "image": IMAGE, "strength": 0.6},
    "inpainting": {"sampler": "dpm2", **PAINTED},
    "outpainting": {"sampler": "dpm2_a", "image": IMAGE, "extend": (0, 0, 64, 0)},
    "hires of latents": {"sampler": "lms", "hires": Hires(scale=1.5, upscaler="bilinear")},
    "hires of pixels": {"sampler": "ipndm", "hires": Hires(scale=1.25)},
    "AND": {"sampler": "dpmpp_sde", "prompt": "a cat AND a hat :0.6", "negative_prompt": "red"},
    "words that change": {"sampler": "dpmpp_2s_a", "prompt": "a [red:blue:0.5] [apple|pear]"},
    "curve and interval": {
        "sampler": "edm_euler",
        "guidance_scale": (7.0, 3.0),
        "guidance_interval": (0.0, 0.7),
    },
    "rescale": {"sampler": "dpmpp_2m", "schedule": "karras", "guidance_rescale": 0.7},
    "noise of CUDA": {"sampler": "dpmpp_2m_sde", "noise": "cuda"},
    "another schedule": {"sampler": "dpmpp_3m_sde", "schedule": "exponential"},
    "two-sided": {"sampler": "dpmpp_2s", "negative_scale": 2.0, "negative_prompt": "green"},
    "deep features": {"sampler": "deis", "cache_interval": 3},
    "other sides": {"sampler": "unipc", "height": 96, "width": 160},
    "a preset": {"preset": "fast", "num_inference_steps": None},
    "a long prompt": {"sampler": "DPM++ 2M Karras", "prompt": LONG, "clip_skip": 2},
    "painted from noise": {"sampler": "ddim", "strength": 1.0, "mask_blur": 0.0, **PAINTED},
    "tiles": {"sampler": "ddim", "height": 1088, "width": 1088, "num_inference_steps": 1},
    LORA: {"sampler": "euler"},
}


def main() -> None:
    """Print a line for each request: the SHA-256 of its pixels, and its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cpu", "openvino"), default="cpu")
    options = parser.parse_args()
    settings = BackendSettings(backend=options.backend, threads=2)
    pipeline = Pipeline.load("pictogram", settings=settings, precision="float32")
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in REQUESTS.items():
            pipeline.set_loras([write_lora(Path(folder))] if name == LORA else [])
            given = {
                "prompt": "a red apple",
                "seed": 3,
                "num_inference_steps": STEPS,
                **fields,
            }
            digest = hashlib.sha256()
            for image in pipeline(**given).images:
                digest.update(repr(image.size).encode() + np.asarray(image).tobytes())
            print(digest.hexdigest(), name, flush=True)


def write_lora(folder: Path) -> Path:
    """Write a small adapter of random numbers."""
    from safetensors.numpy import save_file

    random, path = np.random.default_rng(1), folder / "lora.safetensors"
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = 128
    factors = {
        f"{module}.lora_{end}.weight": (0.2 * random.standard_normal(shape)).astype(np.float32)
        for end, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    save_file(factors, path)
    return path


if __name__ == "__main__":
    main()
