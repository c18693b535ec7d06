"""How long from a checkpoint's file to the first denoising step, and how much memory does it take?

A Stable Diffusion 1.5 of random weights in float16, one file in the original layout, is written
once. A new process opens it, encodes a prompt and runs the first step of a guided 512 × 512
picture on ONNX Runtime; then adapters are put on and taken off. The file is in the system's cache,
as it is when an app is started again. Times count from the process's start, the interpreter
included.
"""

import json
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe, peak_bytes, summary
from engine.checkpoints.families.sd import CLIP_L, SD1
from engine.checkpoints.ldm_names import autoencoder_sources, text_encoder_sources, unet_sources
from engine.configs.diffusion import AutoencoderConfig
from engine.store.cache import cache_folder

RANK = 32
PARAMETERS = "parameters"


def measure(repeats: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure in new processes, one more than `repeats` of them as a warm-up."""
    folder = folder or cache_folder() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, lora = write_checkpoint(folder), write_lora(folder)
    runs = [_process(checkpoint, lora) for _ in range(repeats + 1)][1:]
    float32 = 4 * runs[0][PARAMETERS]
    report: dict[str, Any] = {
        "machine": describe(),
        "request": {"model": "Stable Diffusion 1.5, random weights", "repeats": repeats},
        "file_bytes": checkpoint.stat().st_size,
        "float32_bytes": float32,
    }
    for name in runs[0]["seconds"]:
        report[f"{name}_s"] = summary([run["seconds"][name] for run in runs])
    report["peak_bytes"] = summary([run["peak_bytes"] for run in runs])
    report["peak_share"] = summary([run["peak_bytes"] / float32 for run in runs])
    return report


def _process(checkpoint: Path, lora: Path) -> dict[str, Any]:
    code = "import sys; from benchmarks.load import run; run(*sys.argv[1:])"
    arguments = [str(checkpoint), str(lora), repr(time.time())]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def run(checkpoint: str, lora: str, started: str) -> None:
    """Measure in this process, and print JSON."""
    seconds: dict[str, float] = {}
    last = float(started)

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.time() - last, time.time()

    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    from engine.backends.settings import BackendSettings
    from runtime import Pipeline, Request

    lap("imports")
    pipeline = Pipeline.load(checkpoint, settings=BackendSettings(backend="cpu"))
    lap("read_file")
    for part in ("text_encoder", "step"):
        pipeline.engine(part)
        lap(f"open_{part}")
    # The decoder is not needed before the first step; denoising would open it.
    pipeline.engines.opened["vae_decoder"] = pipeline.engines.opened["step"]
    plan = pipeline.plan(Request(prompt="a lighthouse at dusk", seed=7, num_inference_steps=20))
    lap("encode_prompt")
    seconds["file_to_first_step_begun"] = last - float(started)
    first = next(pipeline.denoise(plan)).latents
    lap("first_step")
    seconds["file_to_first_step_done"] = last - float(started)
    peak = peak_bytes()
    for name, loras in (
        ("lora_on", [lora]),
        ("lora_weight_changed", [f"{lora}:0.5"]),
        ("lora_off", []),
    ):
        last = time.time()
        pipeline.set_loras(loras)
        lap(name)
    assert np.array_equal(next(pipeline.denoise(plan)).latents, first), "the base comes back"
    parameters = sum(
        math.prod(shape)
        for component in pipeline.model.configs
        for shape in pipeline.model.find(component).shapes.values()
    )
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, PARAMETERS: parameters}))


def write_checkpoint(folder: Path) -> Path:
    """Write the model, unless it is there; returns its path."""
    path = folder / "sd15-unlike-float16.safetensors"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**25).astype(np.float32)
    tensors: dict[str, NDArray[Any]] = {}
    for prefix, config, sources in (
        ("model.diffusion_model.", SD1, unet_sources(SD1)),
        ("first_stage_model.", AutoencoderConfig(), autoencoder_sources(AutoencoderConfig())),
        ("", CLIP_L, text_encoder_sources(CLIP_L, "cond_stage_model.transformer.text_model.")),
    ):
        for name, shape in config.tensor_shapes().items():
            tensors[prefix + sources[name].name] = random_tensor(name, shape, pool)
    _save(tensors, path)
    return path


def random_tensor(
    name: str, shape: tuple[int, ...], pool: NDArray[np.float32]
) -> NDArray[np.float16]:
    """Take numbers that keep activations at the size they come in: an untrained network's.

    No two tensors have the same: libraries find equal weights and keep them once. `pool` is normal
    numbers, (n,) float32, repeated where n is small; what comes back is float16 of the shape given.
    """
    start = zlib.crc32(name.encode()) % (len(pool) // 2)
    values = np.resize(pool[start : start + math.prod(shape)], shape)
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return (centre + 0.05 * values).astype(np.float16)
    return (values / math.sqrt(math.prod(shape[1:]))).astype(np.float16)


def write_lora(folder: Path) -> Path:
    """Write an adapter of all of the attention, UNet and text encoder, unless it is there."""
    path = folder / f"lora-rank-{RANK}.safetensors"
    if path.is_file():
        return path
    rng = np.random.default_rng(1)
    tensors: dict[str, NDArray[Any]] = {}
    marks = (".attn1.to_", ".attn2.to_", ".ff.net.", ".self_attn.", ".mlp.fc", ".proj_")
    for prefix, config in (("lora_unet_", SD1), ("lora_te_", CLIP_L)):
        for name, shape in config.tensor_shapes().items():
            if len(shape) > 1 and any(mark in name for mark in marks):
                module = prefix + name.removesuffix(".weight").replace(".", "_")
                ends = (1, 1) if len(shape) == 4 else ()
                down = rng.standard_normal((RANK, shape[1], *ends)) / math.sqrt(shape[1])
                up = 0.1 * rng.standard_normal((shape[0], RANK, *ends))
                tensors[f"{module}.lora_down.weight"] = down.astype(np.float16)
                tensors[f"{module}.lora_up.weight"] = up.astype(np.float16)
                tensors[f"{module}.alpha"] = np.array(RANK / 2, np.float16)
    _save(tensors, path)
    return path


def _save(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    from safetensors.numpy import save_file

    temporary = path.with_suffix(".partial")
    save_file(dict(tensors), temporary)
    temporary.replace(path)
