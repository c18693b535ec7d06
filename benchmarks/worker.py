"""A contender in a process of its own, asked for one run at a time, each bounded in time."""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import peak_bytes
from engine.cache import cache_folder

SHORT_S = 0.3  # a part is repeated for so long: others' turns have emptied the caches before it
REASON_LENGTH = 200  # characters of a library's message that go into the report


class ContenderError(Exception):
    """A contender cannot be measured; its text says why."""


class Worker:
    """The process of a contender; made at once, and ready when the first answer comes."""

    def __init__(self, contender: str, scenario: str, threads: int) -> None:
        code = "import sys; from benchmarks.worker import serve; serve(*sys.argv[1:])"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # Without a limit of its own, a library takes every processor, whatever it is told later.
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "benchmarks" / "inductor"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, contender, scenario, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
        )
        self._unread = b""

    def ready(self, bound_s: float) -> list[str]:
        """Wait until the contender is open; returns its parts; raises ContenderError."""
        parts: list[str] = self._answer(bound_s, "opening")["parts"]
        return parts

    def run(self, part: str, bound_s: float, save: Path | None = None) -> dict[str, Any]:
        """Run a part once; returns `seconds` and `peak_bytes` of the process so far.

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
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f" ({lines[-1][:REASON_LENGTH]})" if lines else ""


def serve(contender: str, scenario: str, threads: str) -> None:
    """Open a contender in this process, then run the parts that are asked for, line by line."""
    from benchmarks.contenders import MEASURED
    from benchmarks.scenarios import SCENARIOS

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        parts = MEASURED[contender].open(SCENARIOS[scenario], int(threads))
        answer(parts=list(parts))
        for line in sys.stdin:
            asked = json.loads(line)
            output, seconds = _timed(parts[asked["part"]])
            if asked["save"]:
                np.save(asked["save"], output)
            answer(seconds=seconds, peak_bytes=peak_bytes())
    except Exception as error:  # libraries raise all kinds, and all are reasons
        text = " ".join(str(error).split())[:REASON_LENGTH]
        answer(failed=f"{type(error).__name__}: {text}")


def _timed(run: Callable[[], NDArray[Any]]) -> tuple[NDArray[Any], float]:
    """Return what a part gives and its seconds, of a short part the median of further runs."""
    laps = [time.perf_counter()]
    output = run()
    laps.append(time.perf_counter())
    if laps[1] - laps[0] >= SHORT_S:
        return output, laps[1] - laps[0]
    while laps[-1] - laps[0] < SHORT_S or len(laps) < 3:
        run()
        laps.append(time.perf_counter())
    return output, statistics.median(np.diff(laps[1:]))
