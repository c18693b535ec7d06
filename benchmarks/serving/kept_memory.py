"""Whether a server's memory stays as it is while requests come and go."""

import threading
from collections.abc import Sequence
from contextlib import closing
from http.client import HTTPException
from itertools import count
from typing import Any

from benchmarks.serving.processes import FAKE, REAL, Client, Server, served
from benchmarks.serving.traffic import SAMPLERS
from engine.errors import BackendError

CLIENTS = 8
REAL_REQUESTS = 300
POINTS = 20  # of a run


def measure(requests: int, real: int = REAL_REQUESTS) -> dict[str, Any]:
    """Send so many requests to a server whose engine draws nothing, and so many to a real one."""
    measured: dict[str, Any] = {"request": {"clients": CLIENTS, "points": POINTS}}
    for name, module, sent in (("fake engine", FAKE, requests), ("real engine", REAL, real)):
        options = ["--threads", "1", "--precision", "float32"]
        with served(module, options) as server:
            measured[name] = {"requests": sent, **_kept(server, sent)}
    return measured


def _kept(server: Server, requests: int) -> dict[str, Any]:
    """Return each process's bytes at so many points, and what they have risen by since a tenth."""
    numbers, lock, points = count(1), threading.Lock(), []
    errors: list[Exception] = []

    def ask() -> None:
        with closing(Client(server.url)) as client:
            while not errors:
                with lock:
                    number = next(numbers)
                if number > requests:
                    return
                try:
                    client.draw(**_fields(number))
                except (BackendError, HTTPException, OSError) as error:
                    errors.append(error)
                if number % max(requests // POINTS, 1) == 0:
                    points.append(server.resident())

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {
        process: {
            "bytes": (resident := [point[process] for point in points]),
            "risen": risen(resident),
        }
        for process in ("http", "engine")
    }


def risen(resident: Sequence[int]) -> float:
    """Return by which share memory has risen since the first tenth: its end, beside the most."""
    after = max(len(resident) // 10, 1) - 1
    return max(resident[after:]) / resident[after] - 1


def _fields(number: int) -> dict[str, Any]:
    """Return the fields of requests that are unlike, and short."""
    return {
        "prompt": f"a {number}",
        "seed": number,
        "num_inference_steps": 2 + number % 5,
        "sampler": SAMPLERS[number % len(SAMPLERS)],
    }
