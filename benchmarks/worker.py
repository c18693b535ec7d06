"""A contender in a process of its own, asked for one run at a time, each bounded in time."""

import importlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import memory
from engine.store.cache import cache_folder

SHORT_S = 0.3  # a part is repeated for so long: others' turns have emptied the caches before it
REASON_LENGTH = 200  # characters of a library's message that go into the report


class ContenderError(Exception):
    """A contender cannot be measured; its text says why."""


class Worker:
    """The process of a contender; made at once, and ready when the first answer comes."""

    def __init__(self, contender: str, scenario: str, threads: int) -> None:
        code = "import sys; from benchmarks.worker import serve; serve(*sys.argv[1:])"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, contender, scenario, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(threads),
        )
        self._unread = b""

    def ready(self, bound_s: float) -> dict[str, Any]:
        """Wait until the contender is open; raises ContenderError.

        Returns its `parts`, and the process's memory when its libraries were `imported` and when
        it was `opened`, as `benchmarks.machine.memory` gives it.
        """
        return self._answer(bound_s, "opening")

    def run(self, part: str, bound_s: float, save: Path | None = None) -> dict[str, Any]:
        """Run a part once; returns `seconds`, and the process's `memory` as above.

        save: where the output goes as an .npy file. Raises ContenderError.
        """
        asked = json.dumps({"part": part, "save": str(save or "")}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(asked)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(f"{part}: the process ended{self._last_words()}") from None
        return self._answer(bound_s, part)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()

    def _answer(self, bound_s: float, doing: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + bound_s
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise ContenderError(f"{doing} took longer than its bound of {bound_s:.0f} s")
            read = os.read(self._process.stdout.fileno(), 2**16)
            if not read:
                raise ContenderError(f"{doing}: the process ended{self._last_words()}")
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ContenderError(f"{doing}: {answer['failed']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait(10)
        self._errors.seek(0)
        return _last_line(self._errors.read())


def serve(contender: str, scenario: str, threads: str) -> None:
    """Open a contender in this process, then run the parts that are asked for, line by line."""
    from benchmarks.contenders import MEASURED
    from benchmarks.gpu_contenders import GPU_MEASURED
    from benchmarks.scenarios import Scenario

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        chosen = {**MEASURED, **GPU_MEASURED}[contender]
        for module in chosen.modules:
            importlib.import_module(module)
        imported = memory()
        parts = chosen.open(Scenario.of(scenario), int(threads))
        answer(parts=list(parts), imported=imported, opened=memory())
        for line in sys.stdin:
            asked = json.loads(line)
            output, seconds = timed(parts[asked["part"]])
            if asked["save"]:
                np.save(asked["save"], output)
            answer(seconds=seconds, memory=memory())
    except Exception as error:  # libraries raise all kinds, and all are reasons
        answer(failed=_reason(error))


def once(
    module: str,
    function: str,
    *arguments: Any,
    threads: int,
    bound_s: float,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Call a function in a process of its own and return what it returns, through JSON.

    variables: of its environment, beside this process's
    Raises ContenderError when it fails or takes longer than its bound.
    """
    code = "import sys; from benchmarks.worker import call; call(*sys.argv[1:])"
    command = [sys.executable, "-c", code, module, function, json.dumps(arguments)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=bound_s,
            env={**_environment(threads), **variables},
        )
    except subprocess.TimeoutExpired:
        raise ContenderError(f"it took longer than its bound of {bound_s:.0f} s") from None
    if done.returncode:
        raise ContenderError(f"the process ended{_last_line(done.stderr)}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "failed" in answer:
        raise ContenderError(answer["failed"])
    return answer


def call(module: str, function: str, arguments: str) -> None:
    """Call a function in this process and print what it returns."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        found = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    except Exception as error:  # libraries raise all kinds, and all are reasons
        found = {"failed": _reason(error)}
    print(json.dumps(found), file=answers, flush=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:REASON_LENGTH]
    return f"{type(error).__name__}: {text}"


def _environment(threads: int) -> dict[str, str]:
    """Limit libraries that take every processor otherwise, whatever they are told later."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "benchmarks" / "inductor"),
    }


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return f" ({lines[-1][:REASON_LENGTH]})" if lines else ""


def timed(run: Callable[[], NDArray[Any]]) -> tuple[NDArray[Any], float]:
    """Return what a part gives, of any shape, and its seconds: a short part's are a median."""
    laps = [time.perf_counter()]
    output = run()
    laps.append(time.perf_counter())
    if laps[1] - laps[0] >= SHORT_S:
        return output, laps[1] - laps[0]
    while laps[-1] - laps[0] < SHORT_S or len(laps) < 3:
        run()
        laps.append(time.perf_counter())
    return output, statistics.median(np.diff(laps[1:]))
