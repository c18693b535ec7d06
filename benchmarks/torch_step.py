"""What torch makes of a guided step of Stable Diffusion 1.5's size, on a GPU of NVIDIA's.

The UNet in float16, channels last, of random weights, for two rows of latents: eager, as a CUDA
graph, or compiled. A large product and a copy are what nothing does faster.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_contenders import COPY, COPY_BYTES, PRODUCT, PRODUCT_SIDE
from engine.checkpoints.families.sd import SD1
from engine.errors import BackendError
from engine.model import Model, find_model

GROUPS, SIDE, TOKENS, TIMESTEP = 2, 64, 77, 500
SMALL_US, HEAVIEST = 10, 25
REPEATS, RUNS = 5, 10  # the median of so many, each of so many steps in a row


def torch_figures(dry: bool, *, compiled: bool) -> dict[str, Any]:
    """Time a step in milliseconds, eager and as a graph, or compiled; dry: small, on a processor.

    Raises BackendError where torch has no GPU, ImportError where there is no torch.
    """
    import torch

    from export.modules.unet import UNet

    if not dry and not torch.cuda.is_available():
        raise BackendError("torch finds no GPU of NVIDIA's; run this on a machine that has one")
    device = "cpu" if dry else "cuda"
    dtype = torch.float32 if dry else torch.float16
    config = Model.open(find_model("pictogram")).unet if dry else SD1
    side, repeats, runs = (8, 1, 1) if dry else (SIDE, REPEATS, RUNS)
    torch.manual_seed(0)
    with torch.device(device):
        unet: Any = UNet(config).eval()
        unet = unet.to(dtype).to(memory_format=torch.channels_last)
        latents = torch.randn(GROUPS, config.in_channels, side, side, dtype=dtype)
        context = torch.randn(GROUPS, TOKENS, config.cross_attention_dim, dtype=dtype)
        timestep = torch.full((GROUPS,), float(TIMESTEP))
    latents = latents.contiguous(memory_format=torch.channels_last)

    def wait() -> None:
        if not dry:
            torch.cuda.synchronize()

    def timed(work: Callable[[], object]) -> dict[str, float]:
        taken = []
        for _ in range(2):
            work()
        for _ in range(repeats):
            wait()
            began = time.perf_counter()
            for _ in range(runs):
                work()
            wait()
            taken.append(1e3 * (time.perf_counter() - began) / runs)
        return {"ms": statistics.median(taken), "spread_ms": max(taken) - min(taken)}

    found: dict[str, Any] = {"torch": torch.__version__}
    with torch.inference_mode():
        if compiled:
            began = time.perf_counter()
            if not dry:  # it takes minutes on a processor
                unet = torch.compile(unet, mode="max-autotune", fullgraph=True)
            unet(latents, timestep, context)
            wait()
            found["compile_s"] = time.perf_counter() - began
            return {**found, "compiled": timed(lambda: unet(latents, timestep, context))}
        found["eager"] = timed(lambda: unet(latents, timestep, context))
        if not dry:
            torch.backends.cudnn.benchmark = True
            found["eager"] = timed(lambda: unet(latents, timestep, context))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                unet(latents, timestep, context)
            found["cuda_graph"] = timed(graph.replay)
        edge, count = (8, 64) if dry else (PRODUCT_SIDE, COPY_BYTES)
        square = torch.rand(edge, edge, device=device, dtype=dtype)
        source = torch.zeros(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        found[PRODUCT] = {"side": edge, **timed(lambda: square @ square)}
        found[COPY] = {"bytes": count, **timed(lambda: target.copy_(source))}
    return found


def kernel_times(work: Callable[[], object], *, dry: bool) -> dict[str, Any]:
    """Return the GPU's heaviest kernels during some work, as torch's profiler sees them.

    small_share: of the time, in kernels of less than `SMALL_US` each
    """
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU if dry else ProfilerActivity.CUDA]) as seen:
        work()
    rows = [
        {"name": row.key, "count": row.count, "us": row.self_device_time_total}
        for row in seen.key_averages()
        if row.count
    ]
    rows.sort(key=lambda row: -row["us"])
    total = sum(row["us"] for row in rows)
    small = sum(row["us"] for row in rows if row["us"] < SMALL_US * row["count"])
    return {
        "total_us": total,
        "kernels": sum(row["count"] for row in rows),
        "small_share": small / total if total else None,
        "heaviest": rows[:HEAVIEST],
    }
