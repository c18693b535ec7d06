"""Groups: which of a run's pictures are drawn together.

Pictures of one request are drawn in groups, one group after the other, and each can be written when
its group is done: the memory is that of a group, and whoever stops keeps what is finished.

With ONNX Runtime on a processor, in float32, a picture is bit for bit the same in every group. One
call with a single group of guidance is not, so pictures with such a call are drawn one by one (see
`runtime.denoising.rows`). Elsewhere the kernels depend on the size of a batch, so there every group
of a run has one size: the last is filled with repeats, whose pictures are dropped.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from engine.backends.settings import ON_GPU
from engine.configs.base import Sizes
from engine.engines import Engines
from engine.errors import BackendError, RequestError
from engine.graphs.graph import Part
from runtime.denoising.rows import part_of
from runtime.plan import Plan
from runtime.request import MAX_IMAGES

__all__ = ["batch_limit", "groups_of"]

# On a processor, the model that ships draws four at once in 0.92 of the time that it takes one by
# one, and eight in the same 0.92.
MOST, MOST_ON_GPU = 4, 8
ACTIVATIONS = 2**26  # numbers, estimated, that a call for a whole group has alive at once


def batch_limit(
    engines: Engines,
    parts: Sequence[Part],
    sizes: Mapping[str, int],
    fits: Callable[[int], None],
    batch_size: int | None = None,
) -> int:
    """Return how many pictures are drawn at once: so many, or what memory and gain allow.

    That is up to 4 on ONNX Runtime, up to 8 on a GPU, and one on OpenVINO.

    parts, sizes: that the pictures need, as `Engines.require_memory` takes them
    fits: raises BackendError for so many pictures at once that a GPU cannot hold
    Raises RequestError for a size that is none.
    """
    if batch_size is not None:
        if type(batch_size) is not int or not 1 <= batch_size <= MAX_IMAGES:
            raise RequestError(
                f"batch_size is {batch_size!r}; give a whole number from 1 to {MAX_IMAGES}"
            )
        return batch_size
    if engines.settings.backend in ON_GPU:
        return _most_on_gpu(fits)
    if not engines.is_exact:
        return 1
    one = Sizes(**{**sizes, "batch": 1})
    model = engines.model
    numbers = max(model.config(part).activations(part, one) for part in parts)
    return max(1, min(MOST, ACTIVATIONS // numbers))


def groups_of(plan: Plan, limit: int, *, is_exact: bool, is_filled: bool = False) -> list[Plan]:
    """Return a plan's pictures as plans that are drawn one after the other.

    limit: pictures of a group at most; is_exact: as `Engines.is_exact` says
    is_filled: whether every group is filled up to the limit where that changes its bits; otherwise
        the groups are about equal
    """
    count = len(plan.seeds)
    size = limit if is_filled else math.ceil(count / math.ceil(count / limit))
    if is_exact:
        size = 1 if plan.is_sensitive else min(size, count)
    starts = range(0, count, size)
    return [
        part_of(plan, range(at, min(at + size, count) if is_exact else at + size)) for at in starts
    ]


def _most_on_gpu(fits: Callable[[int], None]) -> int:
    """Return how many fit into the device's memory by the estimate, up to 8."""
    most = MOST_ON_GPU
    while most > 1:
        try:
            fits(most)
        except BackendError:
            most //= 2
        else:
            break
    return most
