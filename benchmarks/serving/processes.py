"""A server as its operator starts it, and what its two processes take."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import BackendError
from serving.memory import resident_bytes

ROOT = Path(__file__).parents[2]
REAL, FAKE = "latentrt", "benchmarks.serving.fake_engine"
READY_S = ANSWER_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that runs; http, engine: its processes; ready_s: from its start to its readiness."""

    url: str
    http: int
    engine: int
    ready_s: float

    def resident(self) -> dict[str, int]:
        """Return the bytes that each process has in memory."""
        return {
            "http": resident_bytes(self.http) or 0,
            "engine": resident_bytes(self.engine) or 0,
        }


@contextmanager
def served(module: str, options: Sequence[str] = ()) -> Iterator[Server]:
    """Run a server until the end of the `with`; module: `REAL` or `FAKE`.

    Raises BackendError where it does not begin.
    """
    words = [sys.executable, "-m", module, *(["serve"] if module == REAL else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*words, "--port", "0", "--backend", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise BackendError(f"{module} does not serve; run it to see why")
        _wait_ready(found[0])
        ready_s = time.perf_counter() - start
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Server(url=found[0], http=process.pid, engine=int(children[0]), ready_s=ready_s)
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Client:
    """A connection to a server, which is kept."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        self._connection = HTTPConnection(place.hostname, place.port, timeout=ANSWER_S)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> int:
        """Send a request, read the answer whole, and return its status."""
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        self._connection.request("GET" if body is None else "POST", path, data, headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def draw(self, **fields: Any) -> None:
        """Have a picture drawn; raises BackendError where the server draws none."""
        status = self.ask("/v1/images/generations", {"prompt": "a red apple", **fields})
        if status != 200:
            raise BackendError(f"the server answered {status}")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _wait_ready(url: str) -> None:
    end = time.perf_counter() + READY_S
    with closing(Client(url)) as client:
        while client.ask("/ready") != 200:
            if time.perf_counter() > end:
                raise BackendError("the server is not ready")
            time.sleep(0.01)


def processor_seconds(pid: int) -> float:
    """Return the processor's time that a process has taken, its threads' together."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
