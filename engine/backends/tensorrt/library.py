"""TensorRT and TensorRT-RTX: two libraries with one API, and what differs between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from engine.errors import BackendError, install


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What is known of a library without loading it.

    modules: the names under which Python finds it, in this order
    packages, extra: what installs it, and this project's extra of the same
    targets: the GPUs for which it builds engines, wherever it runs, one or all of them; none
        where it builds for the GPU at hand alone
    keeps_timings: whether it times kernels while it builds, and keeps the times in a file
    """

    modules: tuple[str, ...]
    packages: str
    extra: str
    targets: tuple[str, ...] = ()
    keeps_timings: bool = False


LIBRARIES: Mapping[str, Library] = MappingProxyType(
    {
        "tensorrt": Library(
            modules=("tensorrt", "tensorrt_bindings"),
            packages="tensorrt cuda-core cuda-bindings",
            extra="tensorrt",
            keeps_timings=True,
        ),
        "tensorrt_rtx": Library(
            modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
            packages="tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs cuda-core cuda-bindings",
            extra="tensorrt-rtx",
            targets=("sm80", "sm86", "sm89", "sm120", "sm121"),
        ),
    }
)
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "sm75": "TensorRT-RTX multiplies no float32 matrices on Turing (sm75), as every step does",
        "sm90": "TensorRT-RTX does not support Hopper (sm90)",
    }
)


def library(name: str) -> Any:
    """Load a library, "tensorrt" or "tensorrt_rtx", and return its module.

    Raises BackendError, with what to install, when it is missing or cannot be loaded.
    """
    known = LIBRARIES[name]
    failures = []
    for module in known.modules:
        try:
            return import_module(module)
        except (ImportError, OSError) as error:  # OSError: the shared library is not there
            failures.append(str(error))
    raise BackendError(
        f"the backend {name!r} cannot be loaded ({'; '.join(failures)}); "
        + install(known.packages, known.extra)
    )


def version(module: Any) -> str:
    """Return a loaded library's version, such as "1.7.1.116"."""
    return str(module.__version__)


def parse_targets(text: str, name: str = "tensorrt_rtx") -> tuple[str, ...]:
    """Read "sm86,sm89,sm120": the GPUs for which a library is to build.

    Raises BackendError for what the library does not build for.
    """
    targets = tuple(dict.fromkeys(target.strip().lower() for target in text.split(",")))
    for target in targets:
        check_target(name, target)
    return targets


def check_target(name: str, target: str) -> None:
    """Raise BackendError unless a library builds for this target, "sm89"."""
    known = LIBRARIES[name].targets
    if not known:
        raise BackendError(
            f"{name} builds for the GPU of this machine and takes no target ({target!r} was "
            "given); leave it out, or choose the backend tensorrt_rtx"
        )
    if target in UNSUPPORTED:
        raise BackendError(f"{UNSUPPORTED[target]}; choose the backend tensorrt or cuda")
    if target not in known:
        raise BackendError(f"the target {target!r} is not known; choose from {', '.join(known)}")


def compute_capability(module: Any, target: str) -> Any:
    """Return the library's own name for a target."""
    return getattr(module.ComputeCapability, target.upper())
