"""What the stand-in was asked for, from its log."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

OPERATIONS = ("launch", "library", "memset", "copy")


@dataclass(slots=True)
class CallLog:
    """The calls since the last `take`; each is its kind, the function, and what there is to say."""

    path: Path = field(default_factory=lambda: Path(os.environ["LATENTRT_CUDA_LOG"]))
    _read: int = 0

    def take(self) -> list[list[str]]:
        """Return the calls that came since the last time."""
        with self.path.open() as file:
            file.seek(self._read)
            calls = [line.split() for line in file]
            self._read = file.tell() if not calls else os.fstat(file.fileno()).st_size
        return calls


def operations(calls: list[list[str]]) -> dict[str, int]:
    """Count what is queued for the device, by kind."""
    counted = Counter(kind for kind, *_ in calls)
    return {kind: counted[kind] for kind in OPERATIONS}


def arena(calls: list[list[str]]) -> tuple[int, int]:
    """Return the device's bytes that the library took and has not given back, and the most.

    The device's own arrays are taken elsewhere, by cudaMallocFromPoolAsync.
    """
    held = most = 0
    for kind, function, *said in calls:
        if (kind, function) == ("allocate", "cudaMalloc"):
            held += int(said[0])
        elif (kind, function) == ("free", "cudaFree"):
            held -= int(said[0])
        most = max(most, held)
    return held, most


def copied(calls: list[list[str]], direction: str, function: str = "") -> list[int]:
    """Return the bytes of all copies in a direction, as "HtoD", or of one function's."""
    copies = (call for call in calls if call[0] == "copy")
    return [int(n) for _, f, way, n in copies if way == direction and function in ("", f)]
