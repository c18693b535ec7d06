"""What is compared on an NVIDIA GPU: the project's backends there, and diffusers on torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import Contender, load_pipeline, pipeline_parts
from benchmarks.peers import open_pipeline
from benchmarks.peers import pipeline_parts as peer_parts
from benchmarks.scenarios import (
    LONGER,
    LONGER_STEPS,
    PARTS,
    QUEUED,
    STEPS,
    WHOLE,
    Parts,
    Scenario,
    engine_inputs,
)
from engine.backends.settings import BackendSettings

if TYPE_CHECKING:
    from engine.backends.base import DeviceEngine
    from engine.devices.device import DeviceArray

Arrays = Mapping[str, NDArray[Any]]

CEILINGS = "the GPU's ceilings"
GPU_REFERENCE = "diffusers, eager float32 on the GPU"
COMPILED = "diffusers, torch.compile float16"
GPU_PARTS = (*PARTS, STEPS, WHOLE, LONGER)
PRODUCT, COPY, UPLOAD = "float16 product", "copy on the device", "copy to the device"
PRODUCT_SIDE = 8192  # of the square matrices whose product is the ceiling of float16
COPY_BYTES, UPLOAD_BYTES = 2**30, 2**28


def _ours(backend: str, precision: str, scenario: Scenario, threads: int) -> Parts:
    pipeline = load_pipeline(
        scenario, precision, BackendSettings(backend=backend, build_missing=True)
    )
    engine: Any = pipeline.engine("step")
    inputs = engine_inputs(scenario, pipeline.model)["step"]
    return {
        **pipeline_parts(pipeline, scenario, {}),
        STEPS: queued(engine, inputs),
        LONGER: pipeline_parts(pipeline, scenario, {"num_inference_steps": LONGER_STEPS})[WHOLE],
    }


def queued(engine: "DeviceEngine", inputs: Arrays) -> Callable[[], NDArray[Any]]:
    """Return what runs a step several times in a row, and waits for the last alone.

    The inputs are on the device before: this is the engine's own time. What is returned gives the
    latents of the last step, (B, C, h, w) in float32.
    """
    placed: dict[str, DeviceArray] = {}

    def run() -> NDArray[Any]:
        for name, array in inputs.items():
            if name not in placed:
                placed[name] = engine.device.empty(array.shape, array.dtype)
                engine.device.upload(np.ascontiguousarray(array), placed[name])
        outputs = engine.prepare({name: array.shape for name, array in inputs.items()})
        for _ in range(QUEUED):
            engine.enqueue(placed, outputs)
        return engine.device.download(outputs["next_registers"])[:, 0]

    return run


def gpu_diffusers_parts(
    precision: str, compiled: bool, scenario: Scenario, threads: int, device: str = "cuda"
) -> Parts:
    """Open diffusers' own pipeline on a device, eager or compiled."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    if precision == "float32":  # the reference: without TensorFloat-32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    pipe = open_pipeline(scenario, dtype).to(device)
    # The library would widen and narrow it around every decode, which a compiled one cannot stand.
    widened = precision == "float16" and hasattr(pipe, "text_encoder_2")
    if widened:
        pipe.vae.to(torch.float32)
    if compiled:
        pipe.fuse_qkv_projections()
        compiling = partial(torch.compile, mode="max-autotune", fullgraph=True)
        pipe.unet = compiling(pipe.unet)
        pipe.vae.decode = compiling(pipe.vae.decode)
    if widened:
        decode = pipe.vae.decode
        pipe.vae.decode = lambda latents, **options: decode(latents.float(), **options)
    return peer_parts(pipe, dtype, scenario, device)


def _ceilings(scenario: Scenario, threads: int, device: str = "cuda") -> Parts:
    """Do what nothing can do faster: multiply large matrices, and copy."""
    import torch

    matrix = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=torch.float16)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.zeros(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=device != "cpu")

    def product() -> NDArray[Any]:
        return _corner(matrix @ matrix)

    def copy() -> NDArray[Any]:
        return _corner(target.copy_(source))

    def upload() -> NDArray[Any]:
        return _corner(target[:UPLOAD_BYTES].copy_(host, non_blocking=True))

    return {PRODUCT: product, COPY: copy, UPLOAD: upload}


def _corner(tensor: Any) -> NDArray[Any]:
    """Wait for a tensor by reading a little of it."""
    found: NDArray[Any] = tensor[:1].flatten()[:1].cpu().numpy()
    return found


_EAGER = "channels_last, attention by scaled_dot_product_attention, XL's decoder in float32"
_PEERS = {
    "eager": _EAGER,
    "torch.compile": f'{_EAGER}, fused projections, UNet and decoder by torch.compile(mode="max-'
    'autotune", fullgraph=True)',
}
_BACKENDS = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "cuda": "ONNX Runtime CUDA",
}

GPU_CONTENDERS: Mapping[str, Contender] = {
    **{
        f"latentrt, {title} float16": Contender(
            open=partial(_ours, backend, "float16"),
            precision="float16",
            settings=f'precision="float16", BackendSettings("{backend}"), an engine for each size',
        )
        for backend, title in _BACKENDS.items()
    },
    **{
        f"diffusers, {way} float16": Contender(
            open=partial(gpu_diffusers_parts, "float16", way == "torch.compile"),
            precision="float16",
            settings=settings,
        )
        for way, settings in _PEERS.items()
    },
}
# What the GPU can do, measured in each round, and what the others are compared with.
GPU_MEASURED: Mapping[str, Contender] = {
    CEILINGS: Contender(open=_ceilings, precision="", settings="products and copies of torch"),
    **GPU_CONTENDERS,
    GPU_REFERENCE: Contender(
        open=partial(gpu_diffusers_parts, "float32", False), precision="float32", settings=_EAGER
    ),
}
