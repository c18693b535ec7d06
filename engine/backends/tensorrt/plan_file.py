"""A file that TensorRT has written, loaded: its weights lie in a device's memory.

Engines that open the same file on one device share what is loaded.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from engine.devices.device import Device, Shape
from engine.errors import BackendError

Limits = tuple[Shape, Shape]
Profile = Mapping[str, Limits]
"""The smallest and the largest shape of every input."""


class LoadedPlan:
    """A loaded file. Raises BackendError when the library cannot use it on this device.

    engine: the library's; log: what went wrong in it; inputs, outputs: their dtypes by name;
    profiles: what shapes it takes; users: who runs it
    """

    def __init__(self, library: Any, path: Path) -> None:
        self.path = path
        self.users: WeakSet[Any] = WeakSet()
        self.log = _log(library)
        self._runtime = library.Runtime(self.log)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                self.engine = self._runtime.deserialize_cuda_engine(m)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise BackendError(
                f"the engine {path} cannot be read ({error}); delete it and build it again"
            ) from error
        if self.engine is None:
            raise self.failure("cannot load it")
        dtypes = self._dtypes(library)
        given = library.TensorIOMode.INPUT
        self.inputs = {n: d for n, d in dtypes.items() if self.engine.get_tensor_mode(n) == given}
        self.outputs = {n: d for n, d in dtypes.items() if n not in self.inputs}
        self.profiles: list[Profile] = [
            {name: self._limits(name, i) for name in self.inputs}
            for i in range(self.engine.num_optimization_profiles)
        ]

    def failure(self, what: str) -> BackendError:
        """Make the error for what the library could not do, with its own words."""
        said = f" ({self.log.errors[-1].strip()[:300]})" if self.log.errors else ""
        self.log.errors.clear()
        return BackendError(
            f"TensorRT {what}: {self.path.name}{said}; if the library, the driver or the GPU has "
            "changed, build the engine again"
        )

    def fitting_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Return the narrowest profile that allows these shapes of the inputs.

        Raises BackendError with what is allowed.
        """
        fitting = [i for i, profile in enumerate(self.profiles) if not _outside(profile, shapes)]
        if fitting:
            return min(fitting, key=lambda i: _numbers(self.profiles[i]))
        nearest = min(self.profiles, key=lambda profile: len(_outside(profile, shapes)))
        name = _outside(nearest, shapes)[0]
        limits = dict.fromkeys(profile[name] for profile in self.profiles)
        allowed = " or ".join(
            f"{low} to {high}" if low != high else f"{high}" for low, high in limits
        )
        raise BackendError(
            f"the engine {self.path.name} takes {name} of the shape {allowed}, and "
            f"{tuple(shapes.get(name, ()))} came; ask for a picture of another size or fewer at "
            "once, or build an engine for this one"
        )

    def _dtypes(self, library: Any) -> dict[str, np.dtype[Any]]:
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        return {
            name: np.dtype(library.nptype(self.engine.get_tensor_dtype(name))) for name in names
        }

    def _limits(self, name: str, profile: int) -> Limits:
        low, _, high = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)


_SHARED: WeakValueDictionary[tuple[Path, Device], LoadedPlan] = WeakValueDictionary()


def load_shared(library: Any, path: Path, device: Device) -> LoadedPlan:
    """Load a file, or return what is loaded of it; raises BackendError."""
    device.memory()  # makes the device this thread's, and so the library's
    loaded = _SHARED.get((path, device))
    if loaded is None:
        _SHARED[path, device] = loaded = LoadedPlan(library, path)
    return loaded


def take_own(library: Any, loaded: LoadedPlan, device: Device) -> LoadedPlan:
    """Return what nobody else will run, so that it may be changed: a copy, or the same."""
    if _SHARED.get((loaded.path, device)) is loaded:
        del _SHARED[loaded.path, device]
    return LoadedPlan(library, loaded.path) if len(loaded.users) > 1 else loaded


def _outside(profile: Profile, shapes: Mapping[str, Shape]) -> list[str]:
    """Name the inputs whose shapes a profile does not allow."""
    return [
        name
        for name, (low, high) in profile.items()
        if len(shapes.get(name, ())) != len(low)
        or not all(a <= b <= c for a, b, c in zip(low, shapes[name], high, strict=True))
    ]


def _numbers(profile: Profile) -> int:
    return sum(int(np.prod(high, dtype=np.int64)) for _, high in profile.values())


def _log(library: Any) -> Any:
    """Make a logger that keeps what went wrong, for the message that a user sees."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            levels = library.ILogger.Severity
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.errors.append(msg)

    return Log()
