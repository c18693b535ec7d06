"""Servers in a thread of the test's process, on a port of their own; with or without a model."""

import os
import threading
import time
from contextlib import contextmanager

import uvicorn

from engine.backends.settings import BackendSettings
from runtime import Pipeline
from serving.http.access import AccessRules
from serving.http.app import make_service
from serving.http.connections import ImpatientProtocol
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.loop import Loop
from serving.memory import resident_bytes
from serving.model_runner import Models
from serving.row_limits import RowLimits
from serving.server import listen_on
from tests.support.model_runners import FakeModelRunner

CATALOG = Catalog(models=("pictogram", "other"), loras=("ink",))


class LocalEngine:
    """An `EngineClient` in threads of this process."""

    def __init__(self, make):
        self._make = make
        self._loop = None

    @property
    def is_ready(self):
        """As `EngineClient` says."""
        return self._loop is not None

    @property
    def memory_bytes(self):
        """As `EngineClient` says."""
        return resident_bytes(os.getpid())

    def start(self, tell):
        """As `EngineClient` says."""
        self._loop = self._make(tell)
        self._loop.start()

    def submit(self, order):
        """As `EngineClient` says."""
        assert self._loop is not None
        self._loop.submit(order)

    def cancel(self, job):
        """As `EngineClient` says."""
        if self._loop is not None:
            self._loop.cancel(job)

    def stop(self):
        """As `EngineClient` says."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None


def load(model):
    settings = BackendSettings(backend="cpu", threads=1)
    return Pipeline.load(model, settings=settings, precision="float32")


def models(loras=None, limits=None):
    return Models(
        models={"pictogram": "pictogram", "other": "pictogram"},
        loras=loras or {},
        load=load,
        limits=limits or Limits(),
    )


class SlowStudio(FakeModelRunner):
    """One whose steps take real time."""

    def __init__(self, seconds=0.002):
        super().__init__(texts_cost=0.0)
        self.seconds = seconds

    def step(self, unfinished_pictures):
        time.sleep(self.seconds)
        super().step(unfinished_pictures)


class Running:
    """A server that runs: where it is, and what it is made of."""

    def __init__(self, url, service, loops):
        self.url, self.service, self.loops = url, service, loops

    @property
    def loop(self):
        return self.loops[-1]


@contextmanager
def serving(
    runner, *, keys=None, limits=None, catalog=CATALOG, names=(), origins=(), rows=8, port=0
):
    """Serve with a runner until the end of the `with`."""
    loops = []

    def make(tell):
        loops.append(Loop(runner, tell, limits=RowLimits(rows)))
        return loops[-1]

    rules = AccessRules.of("127.0.0.1", names, origins, keys)
    service = make_service(LocalEngine(make), catalog, rules, limits=limits, rows=rows)
    with listening(service, port) as url:
        yield Running(url, service, loops)


@contextmanager
def listening(service, port=0):
    """Let a service listen; yields its URL. port: 0 for any that is free."""
    config = uvicorn.Config(
        service.app, log_config=None, access_log=False, ws="none", http=ImpatientProtocol
    )
    server, listener = uvicorn.Server(config), listen_on("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
