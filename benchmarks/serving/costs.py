"""What serving costs beside drawing: HTTP, one request at a time, and the start."""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from benchmarks.machine import summary
from benchmarks.serving.load import MODEL
from benchmarks.serving.processes import FAKE, REAL, Client, Server, processor_seconds, served
from engine.backends.settings import BackendSettings
from runtime.pipeline import Pipeline

STARTS = 5
FAKE_REQUESTS = 1000
WARM_UPS = 50
ROUNDS, PER_ROUND = 8, 4
STEPS = 20


def measure(threads: int, requests: int = FAKE_REQUESTS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure the three; threads: of the engine and of the pipeline beside it."""
    options = ["--threads", str(threads), "--precision", "float32"]
    ready = []
    for _ in range(STARTS):
        with served(REAL, options) as server:
            ready.append(server.ready_s)
    with served(FAKE) as server:
        http = {f"{steps} steps": _http_cost(server, requests, steps) for steps in (1, STEPS)}
    with served(REAL, options) as server:
        beside = _beside_the_pipeline(server, threads, rounds)
    return {
        "request": {"threads": threads, "requests": requests, "rounds": rounds, "steps": STEPS},
        "ready_s": summary(ready),
        "http": http,
        "one_at_a_time": beside,
    }


def _http_cost(server: Server, requests: int, steps: int) -> dict[str, float]:
    """Return milliseconds a request: of each process's processor, and of the client's clock."""
    with closing(Client(server.url)) as client:
        for seed in range(WARM_UPS):
            client.draw(seed=seed, num_inference_steps=steps)
        before = [processor_seconds(pid) for pid in (server.http, server.engine)]
        start = time.perf_counter()
        for seed in range(requests):
            client.draw(seed=seed, num_inference_steps=steps)
        waited = time.perf_counter() - start
        after = [processor_seconds(pid) for pid in (server.http, server.engine)]
    http, engine = (1e3 * (b - a) / requests for a, b in zip(before, after, strict=True))
    return {"http_ms": http, "engine_ms": engine, "answer_ms": 1e3 * waited / requests}


def _beside_the_pipeline(server: Server, threads: int, rounds: int) -> dict[str, Any]:
    """Draw by turns here and through the server; the ratio of their times, by round."""
    pipeline = Pipeline.load(
        MODEL, precision="float32", settings=BackendSettings(backend="cpu", threads=threads)
    )

    def here(seed: int) -> None:
        pipeline("a red apple", seed=seed, num_inference_steps=STEPS)

    with closing(Client(server.url)) as client:

        def there(seed: int) -> None:
            client.draw(seed=seed, num_inference_steps=STEPS)

        for draw in (here, there):
            draw(0)
        pairs = [(_seconds(here), _seconds(there)) for _ in range(rounds)]
    return {
        "pipeline_s": summary([own for own, _ in pairs]),
        "served_s": summary([served for _, served in pairs]),
        "ratio": statistics.median(served / own for own, served in pairs),
    }


def _seconds(draw: Callable[[int], None]) -> float:
    start = time.perf_counter()
    for seed in range(PER_ROUND):
        draw(seed)
    return (time.perf_counter() - start) / PER_ROUND
