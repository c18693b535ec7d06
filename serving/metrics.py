"""What a server counts, for Prometheus. No label holds anything of a prompt."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
STEP_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The numbers of one server, in a registry of its own.

    rows: at most in a step, before the first
    """

    def __init__(self, rows: int) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "latentrt_requests", "Answers, by API and status", ("api", "code"), registry=registry
        )
        self.request_seconds = Histogram(
            "latentrt_request_seconds",
            "From a request to its end",
            ("api",),
            registry=registry,
            buckets=SECONDS,
        )
        self.first_step_seconds = Histogram(
            "latentrt_first_step_seconds",
            "From a request to its first step",
            registry=registry,
            buckets=SECONDS,
        )
        self.step_seconds = Histogram(
            "latentrt_step_seconds",
            "Of a step, by its rows",
            ("bucket_rows",),
            registry=registry,
            buckets=STEP_SECONDS,
        )
        self.cancelled = Counter(
            "latentrt_cancelled", "Requests that were dropped", ("why",), registry=registry
        )
        self.refused = Counter(
            "latentrt_refused", "Requests that were refused", ("why",), registry=registry
        )
        self.pictures = Counter("latentrt_pictures", "Pictures drawn", registry=registry)
        self.restarts = Counter("latentrt_engine_restarts", "Engines that died", registry=registry)
        self.rows = Gauge("latentrt_rows", "Rows of the last step", registry=registry)
        self.rows_capacity = Gauge(
            "latentrt_rows_capacity", "Rows at most in a step", registry=registry
        )
        self.waiting = Gauge("latentrt_waiting", "Requests that are unfinished", registry=registry)
        self.queued_work = Gauge(
            "latentrt_queued_work_seconds", "How long their work takes", registry=registry
        )
        self.engine_memory = Gauge(
            "latentrt_engine_memory_bytes", "Resident in the engine's process", registry=registry
        )
        self._last, self._limit = 0, rows
        self._seconds: dict[int, Histogram] = {}

    def turn(self, rows: int, limit: int, seconds: float) -> None:
        """Note a step: one comes every few milliseconds, so gauges are set when they are read."""
        self._last, self._limit = rows, limit
        if rows not in self._seconds:
            self._seconds[rows] = self.step_seconds.labels(str(rows))
        self._seconds[rows].observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        self.rows.set(self._last)
        self.rows_capacity.set(self._limit)
        return generate_latest(self.registry)
