"""A server's life: it listens, draws, is asked to end, finishes what it has begun, and ends."""

import argparse
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from engine.errors import BackendError, OutputError
from serving.engine_group import EngineGroup
from serving.http.access import AccessRules
from serving.http.app import Service, make_service
from serving.http.connections import ImpatientProtocol
from serving.http.fields import Catalog
from serving.keys import Keys
from serving.row_limits import RowLimits
from serving.supervisor import ProcessEngine

KEEP_ALIVE = 30  # seconds that an idle connection is kept
FILES = 2**16  # that a process may have open, where the system allows as many


def serve(
    options: argparse.Namespace, keys: Keys | None, engine: ProcessEngine | EngineGroup
) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises OutputError or BackendError."""
    settings = engine.settings
    service = make_service(
        engine,
        Catalog(
            models=tuple(settings.models),
            loras=tuple(settings.loras),
            controls=tuple(settings.controls),
            ip_adapters=tuple(settings.ip_adapters),
            upscalers=tuple(settings.upscalers),
        ),
        AccessRules.of(options.host, options.hosts, options.origins, keys),
        limits=settings.limits,
        rows=RowLimits(settings.rows).largest,
    )
    engine.on_death(service.metrics.restarts.inc)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    allow_connections()
    listener = listen_on(options.host, options.port)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _announce(f"listening on http://{shown}:{port}")
    with listener:
        Server(service, engine).run(sockets=[listener])
    if engine.has_failed:
        raise BackendError("an engine could not start; what it said stands above")


def allow_connections() -> None:
    """Let this process have a file for each of many connections, where the system lets it.

    The usual 1024 are no more than the idle ones of one stranger.
    """
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _announce(text: str) -> None:
    """Say something on the output; a full disk or a closed pipe there ends no server."""
    try:
        print(text, flush=True)
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the last flush would fail too


def listen_on(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OutputError where the port is taken.

    It says that it speaks TCP, which asyncio wants to know before it lets small answers go out at
    once; otherwise every answer would wait for 40 ms.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=2048)
        return socket.socket(family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{host}, port {port}, cannot be listened on ({why}); choose another --port or --host"
        ) from error


class Server(uvicorn.Server):
    """uvicorn, which at the first signal takes no more, finishes what was begun, and then ends.

    Until then it answers: `/ready` says that it is going down, and finished pictures are fetched.
    A second signal ends it at once.
    """

    def __init__(self, service: Service, engine: ProcessEngine | EngineGroup) -> None:
        config = uvicorn.Config(
            service.app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            http=ImpatientProtocol,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self._jobs = service.jobs
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self._jobs.draining:
            self.force_exit = True
            super().handle_exit(signal.SIGTERM, frame)
        self._jobs.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: nothing is left to finish, or nothing can be begun."""
        jobs = self._jobs
        drained = jobs.draining and not jobs.unfinished() and not jobs.awaits_fetching
        return await super().on_tick(counter) or drained or self._engine.has_failed
