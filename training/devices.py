"""Several processes that train one model, each on its device: torch's DDP (arXiv:2006.15704).

`torchrun` starts them and says in the environment who is who. What is random in a step is drawn for
the whole batch by every process, and each computes its share of the rows: so the loss and the
gradients are those of one process.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import RequestError

Losses = dict[str, Tensor]  # what the progress bar shows; "loss" is minimised
WAIT = timedelta(hours=4)  # while the first process encodes a large data set


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yields the device of this one.

    device: "cpu" or "cuda"
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=WAIT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this is the process that writes files and shows progress."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def first_alone() -> Iterator[bool]:
    """Let the first process go ahead and the others follow: yields whether this is the first."""
    if not is_first():
        dist.barrier()
    yield is_first()
    if dist.is_initialized() and is_first():
        dist.barrier()


def share(rows: Tensor) -> Tensor:
    """Return this process's share of what was drawn for the whole batch, (B, …)."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def check_batch(batch_size: int) -> None:
    """Raise RequestError unless the batch can be shared out evenly."""
    if batch_size % count():
        raise RequestError(
            f"--batch-size {batch_size} is of all processes together, and there are {count()}; "
            "give a multiple of that"
        )


def agreed(seconds: float) -> float:
    """Return the first process's time, by which all end together."""
    if not dist.is_initialized():
        return seconds
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor([seconds], dtype=torch.float64, device=kind)
    dist.broadcast(told, 0)
    return float(told.item())


def mean(value: Tensor) -> float:
    """Return the mean of what each process has of one number, of shape ()."""
    value = value.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value.item()) / count()


class _Losses(nn.Module):
    """The losses as a module's forward pass, since DDP looks at that of a module."""

    def __init__(self, module: nn.Module, losses: Callable[[int], Losses]) -> None:
        super().__init__()
        self.module, self.losses = module, losses

    def forward(self, step: int) -> Losses:
        """Compute this process's losses at a step."""
        return self.losses(step)


def distributed(module: nn.Module, losses: Callable[[int], Losses]) -> Callable[[int], Losses]:
    """Return losses whose gradients become the mean of all processes' gradients."""
    if not dist.is_initialized():
        return losses
    wrapped = DistributedDataParallel(_Losses(module, losses), broadcast_buffers=False)

    def together(step: int) -> Losses:
        values: Losses = wrapped(step)
        return values

    return together
