"""A replica that speaks HTTP: what `latentrt serve` answers with, before a cluster's engines."""

import logging
import sys
import time
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from serving.engine_settings import EngineSettings
from serving.http.access import AccessRules
from serving.http.app import make_service
from serving.http.fields import Catalog
from serving.ray.client import EVERY, ClusterEngine
from serving.row_limits import RowLimits

ENGINE = "Engine"  # the deployment of `EngineReplica`
RUNNING = "RUNNING"  # a replica's state, in Ray Serve's words

_made: list[ASGIApp] = []  # by this process' gateway, for Ray Serve to take


class Gateway:
    """Answers requests, has their pictures drawn, and keeps its callers' jobs.

    engines: a handle to the deployment of engines; settings: theirs; rules: who may come in
    """

    def __init__(self, engines: Any, settings: EngineSettings, rules: AccessRules) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        here = serve.get_replica_context()

        def running() -> int:
            deployments = serve.status().applications[here.app_name].deployments
            return int(deployments[ENGINE].replica_states.get(RUNNING, 0))

        while not running():  # or the first requests would be refused
            time.sleep(EVERY)
        engine = ClusterEngine(engines.options(stream=True), here.replica_tag, running)
        service = make_service(
            engine,
            Catalog.of(settings),
            rules,
            limits=settings.limits,
            rows=RowLimits(settings.rows).largest,
        )
        engine.on_death(service.metrics.restarts.inc)
        _made.append(service.app)


def made_app() -> ASGIApp:
    """Return the application of the gateway that this process has made."""
    return _made[-1]
