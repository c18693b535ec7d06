"""Ray Serve's own classes for what `routing` decides."""

import pickle
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serving.ray.routing import caller_key, model_set, ranked

__all__ = ["CallerRouter", "WarmRouter"]


class WarmRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Sends pictures to engines that have their model and adapters loaded."""

    async def choose_replicas(
        self,
        candidate_replicas: Sequence[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return engines in ranks, as `ranked` says."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # where all of them are full
        _, order = pending_request.args
        return ranked(model_set(order.picture_request), candidate_replicas)


class CallerRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Sends all requests of a caller to the same gateway, as long as that lives.

    A gateway has its callers' jobs in its memory.
    """

    def _routing_key(self, pending_request: PendingRequest | None) -> str | None:
        scope: Any = None
        if pending_request is not None and pending_request.args:
            with suppress(Exception):  # of another version of Ray Serve
                scope = pickle.loads(pending_request.args[0])._asgi_scope
        return caller_key(scope) or super()._routing_key(pending_request)
