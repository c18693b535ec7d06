"""What is said when a device's memory does not suffice."""

from engine.errors import BackendError


def out_of_memory(asked: int, free: int, total: int) -> BackendError:
    """Make the error for a piece of memory that a device has not, in bytes."""
    missing = (
        f"{_size(asked - free)} are missing"
        if asked > free
        else "these are in pieces which are too small"
    )
    return BackendError(
        f"{_size(asked)} of the GPU's memory were asked for and {_size(free)} of {_size(total)} "
        f"are free, so {missing}; ask for a smaller picture or fewer at once, or close other "
        "programs that use the GPU"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
