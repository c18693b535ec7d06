"""What can go wrong, as a tree.

LatentrtError
├── ModelError      a model folder, its configuration or its weights cannot be used
├── GraphError      a graph is missing, or does not fit the model that it is asked to run
├── BackendError    the library that runs engines is missing or failed
├── RequestError    a wish that cannot be fulfilled: size, steps, prompt, sampler, seed
└── OutputError     a result cannot be written where it was asked for

Every message is one sentence or two: what came, what is allowed, what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BackendError",
    "GraphError",
    "LatentrtError",
    "ModelError",
    "OutputError",
    "RequestError",
    "first_line",
    "install",
    "libraries_of",
]

OURS = frozenset({"benchmarks", "engine", "export", "latentrt", "runtime", "training"})


class LatentrtError(Exception):
    """The base of every error that this project raises on purpose."""


class ModelError(LatentrtError):
    """A model folder, its configuration or its weights cannot be used."""


class GraphError(LatentrtError):
    """A graph is missing, or does not fit the model that it is asked to run."""


class BackendError(LatentrtError):
    """The library that runs engines is missing or failed."""


class RequestError(LatentrtError, ValueError):
    """A wish that cannot be fulfilled: size, steps, prompt, sampler, seed."""


class OutputError(LatentrtError, OSError):
    """A result cannot be written where it was asked for."""


def first_line(error: Exception) -> str:
    """Make one line of what a library says, for the message of an error of ours."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def install(packages: str, extra: str) -> str:
    """Say how to install what is missing: its packages, or this project's extra in a clone."""
    clone = f"in a clone of Latentrt `pip install '.[{extra}]'`"
    return f"install it with `pip install {packages}` ({clone})"


@contextmanager
def libraries_of(extra: str) -> Iterator[None]:
    """Raise BackendError where a library of one of this project's extras is missing within."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if not library or library in OURS:
            raise
        packages = library.replace("_", "-")
        raise BackendError(
            f"this needs {library}, which is not installed; {install(packages, extra)}"
        ) from error
