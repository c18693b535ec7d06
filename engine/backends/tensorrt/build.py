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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine import errors
from engine.backends.tensorrt.build_request import TERMINATION_GRACE_S, BuildRequest
from engine.errors import BackendError
from engine.store.cache import cache_folder

CHILD = ("-P", "-m", "engine.backends.tensorrt.build_worker")
FINISHED = "finished"
STDERR_TAIL = 600  # characters of what a crashed builder had said


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
                raise BackendError(_crash_message(request, child.wait(), last.get("phase"), words))
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
                child.wait(TERMINATION_GRACE_S)
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


def _crash_message(request: BuildRequest, status: int, phase: str | None, words: IO[bytes]) -> str:
    """Say in one sentence how a child ended that did not say so itself."""
    cause = f"ended with status {status}"
    if status < 0:
        cause = f"died of {signal.Signals(-status).name}"
    advice = "try another optimization level or the other backend"
    if sys.platform != "win32" and status == -signal.SIGKILL:
        advice = "the system kills what takes too much memory: close other programs"
    words.seek(0)
    said = " ".join(words.read().decode(errors="replace").split())[-STDERR_TAIL:]
    return (
        f"the builder of {request.library} {cause} at {phase or 'the start'!r} of the "
        f"{request.part} of {request.model}, from the graph {request.graph.name}; {advice}"
        + (f" (its last words: {said})" if said else "")
    )
