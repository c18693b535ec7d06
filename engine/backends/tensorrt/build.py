"""Building an engine with TensorRT or TensorRT-RTX, in a process of its own.

A builder may crash, and takes gigabytes that it does not all give back; neither is to happen to the
program that asked. The child opens the model's weights itself, so they are on the disk once. It
reads a request from its standard input, one line of JSON, and writes lines of JSON about how it
gets on. It stops when its input closes: this process may be killed, and nothing stays.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

from engine import errors
from engine.backends.tensorrt.library import LIBRARIES, check_target
from engine.backends.tensorrt.profiles import Profile
from engine.errors import BackendError
from engine.graphs.signature import Part
from engine.store.cache import cache_folder

CHILD = ("-m", "engine.backends.tensorrt.build_worker")
PATIENCE = 3.0  # seconds that a cancelled builder has to stop by itself
FINISHED = "finished"
LEVELS = range(6)
PATHS = ("graph", "model", "vae", "preview_decoder", "timings")
LAST_WORDS = 600  # characters of what a crashed builder had said


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """Choices of a build.

    profiles: the sizes it serves; with several, the one that fits a request is used
    refit: whether weights may be changed later, by adapters or another checkpoint; TensorRT-RTX
        builds such an engine only beside a GPU
    optimization_level: 0 builds soonest, 5 runs fastest; None leaves it to the library
    workspace_bytes: GPU memory that one layer may take beside its tensors; None sets no limit
    target: the GPU, "sm89"; None is the one at hand with TensorRT, and with TensorRT-RTX every
        GPU from Ampere on but Hopper
    """

    profiles: tuple[Profile, ...]
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no builder takes."""
        if not self.profiles:
            raise BackendError("an engine needs one shape profile or more; give a height and width")
        if self.optimization_level not in (None, *LEVELS):
            raise BackendError(
                f"optimization_level is {self.optimization_level!r}; give a number from 0, which "
                "builds soonest, to 5, which runs fastest"
            )
        if self.workspace_bytes is not None and (
            type(self.workspace_bytes) is not int or self.workspace_bytes < 1
        ):
            raise BackendError(
                f"workspace_bytes is {self.workspace_bytes!r}; give a number of bytes from 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One engine to be built: which part of which model, from which graph, and how.

    library: "tensorrt" or "tensorrt_rtx"
    model, vae, preview_decoder, prediction_type: as `engine.model.Model.open` takes them
    loras: adapters to build in, as `engine.adapters.parse_adapter` reads them
    timings: a file of kernels' times to read and add to, for the library that keeps them
    """

    library: str
    part: Part
    graph: Path
    model: Path
    settings: BuildSettings
    vae: Path | None = None
    preview_decoder: Path | None = None
    prediction_type: str | None = None
    loras: tuple[str, ...] = ()
    timings: Path | None = None

    def __post_init__(self) -> None:
        """Refuse unknown libraries, and targets that they do not build for."""
        if self.library not in LIBRARIES:
            raise BackendError(
                f"the library {self.library!r} is not known; choose {' or '.join(LIBRARIES)}"
            )
        if self.settings.target is not None:
            check_target(self.library, self.settings.target)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON's values, from which `from_dict` makes the same request."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = {
            field.name: getattr(self.settings, field.name) for field in fields(BuildSettings)
        }
        settings["profiles"] = [profile.to_dict() for profile in self.settings.profiles]
        paths = {name: values[name] and str(values[name]) for name in PATHS}
        return {**values, **paths, "loras": list(self.loras), "settings": settings}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        profiles = tuple(map(Profile.from_dict, values["settings"]["profiles"]))
        settings = BuildSettings(**{**values["settings"], "profiles": profiles})
        paths = {name: values[name] and Path(values[name]) for name in PATHS}
        return cls(**{**values, **paths, "loras": tuple(values["loras"]), "settings": settings})


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """How far a build is: the builder's own name of what it does, and 0 to 1 of all that it has."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build took: seconds, the child's peak of memory and the engine's size in bytes.

    peak_bytes is None where the system does not tell.
    """

    seconds: float
    peak_bytes: int | None
    nbytes: int


def build(
    request: BuildRequest,
    path: Path,
    progress: Callable[[BuildProgress], None] = lambda _: None,
) -> Built:
    """Build an engine into a file, and wait for it.

    Raises GraphError for a graph that is damaged or that the library cannot take, ModelError for
    a model, BackendError when the library is missing, refuses or dies, OutputError when there is
    no room. Then, and when it is interrupted, there is no child and no file.
    """
    started = time.monotonic()
    line = json.dumps({"request": request.to_dict(), "to": str(path)})
    try:
        with tempfile.TemporaryFile() as words, _child(words) as child:
            last = _follow(child, line, progress)
            if "error" in last:
                raise getattr(errors, last["error"])(last["message"])
            if "peak_bytes" not in last:
                raise BackendError(_obituary(request, child.wait(), last.get("phase"), words))
            progress(BuildProgress(phase=FINISHED, fraction=1.0))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Built(
        seconds=time.monotonic() - started,
        peak_bytes=last["peak_bytes"],
        nbytes=path.stat().st_size,
    )


def timings_path(library: str, version: str, device: str) -> Path:
    """Name the file of kernels' times of a library's version on a kind of GPU."""
    name = "-".join((library, version, re.sub(r"[^A-Za-z0-9]+", "-", device)))
    return cache_folder() / "timings" / f"{name}.bin"


@contextmanager
def _child(words: IO[bytes]) -> Iterator["subprocess.Popen[str]"]:
    """Start a child that hears no Ctrl-C of ours, and leave none behind.

    words: a file that takes what it and the library write
    """
    alone: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    child = subprocess.Popen(
        [sys.executable, *CHILD],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        encoding="utf-8",
        **alone,
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(OSError):
            child.stdin.close()  # which tells it to stop
        try:
            with suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _follow(
    child: "subprocess.Popen[str]", request: str, progress: Callable[[BuildProgress], None]
) -> dict[str, Any]:
    """Pass on how far the child is, and return what it wrote last."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):  # it is dead already
        child.stdin.write(request + "\n")
        child.stdin.flush()
    last: dict[str, Any] = {}
    for line in child.stdout:
        last = json.loads(line)
        if "phase" in last:
            progress(BuildProgress(**last))
    return last


def _obituary(request: BuildRequest, status: int, phase: str | None, words: IO[bytes]) -> str:
    """Say in one sentence how a child ended that did not say so itself."""
    cause = f"ended with status {status}"
    if status < 0:
        cause = f"died of {signal.Signals(-status).name}"
    advice = "try another optimization level or the other backend"
    if sys.platform != "win32" and status == -signal.SIGKILL:
        advice = "the system kills what takes too much memory: close other programs"
    words.seek(0)
    said = " ".join(words.read().decode(errors="replace").split())[-LAST_WORDS:]
    return (
        f"the builder of {request.library} {cause} at {phase or 'the start'!r} of the "
        f"{request.part} of {request.model}, from the graph {request.graph.name}; {advice}"
        + (f" (its last words: {said})" if said else "")
    )
