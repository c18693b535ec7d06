"""The application that `serve run deploy/ray.yaml` starts: gateways before engines."""

import os
from collections.abc import Mapping
from typing import Any

from ray import serve

from engine.errors import RequestError
from serving.configuration import parse_options
from serving.http.access import AccessRules
from serving.options import engine_settings, make_parser, read_keys
from serving.ray.engine import EngineReplica
from serving.ray.gateway import ENGINE, Gateway, made_app
from serving.row_limits import RowLimits

__all__ = ["application"]

NOT_HERE = {
    "config": "write its settings into args",
    "devices": "say how many engines there are, with num_gpus of their ray_actor_options",
    "port": "http_options has Ray Serve's",
}
GRACE = 630.0  # seconds that a replica that goes has to finish what it has begun
WITHOUT_LIMIT = 10_000  # the gateways refuse by themselves, in words that clients know
BOARDS = 4  # times the rows of a step, which an engine orders among its callers


def application(args: Mapping[str, Any]) -> Any:
    """Return the application; args: options of `latentrt serve` by their names.

    Replicas, their resources and scaling are the file's, where Ray Serve reads them. Variables of
    the environment count as for `latentrt serve`. Raises RequestError or ModelError.
    """
    for name in args.keys() & NOT_HERE.keys():
        raise RequestError(f"{name} in args means nothing on a cluster; {NOT_HERE[name]}")
    options = parse_options(make_parser("serve run"), [], os.environ, args)
    settings, keys = engine_settings(options), read_keys(options)
    rules = AccessRules.of(options.host, options.hosts, options.origins, keys)
    engines = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=BOARDS * RowLimits(settings.rows).largest,
        request_router_config={
            "request_router_class": "serving.ray.routers:WarmRouter",
            "request_routing_stats_period_s": 1.0,
        },
        graceful_shutdown_timeout_s=GRACE,
    )(EngineReplica)
    gateways = serve.deployment(
        name="Gateway",
        max_ongoing_requests=WITHOUT_LIMIT,
        request_router_config={"request_router_class": "serving.ray.routers:CallerRouter"},
        graceful_shutdown_timeout_s=GRACE,
    )(serve.ingress(made_app)(Gateway))
    return gateways.bind(engines.bind(settings), settings, rules)
