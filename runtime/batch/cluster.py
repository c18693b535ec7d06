"""A batch on a Ray cluster: actors of Ray Data draw pieces of it, and one process writes the files.

An actor keeps its model loaded, and draws the requests of a piece one beside the other. What dies
with an actor or with its machine is given to another by Ray.
"""

import argparse
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.backends.settings import ON_GPU
from engine.errors import BackendError, first_line
from runtime.batch.drawing import Batch
from runtime.batch.lines import Line
from runtime.batch.requests import Defaults
from runtime.batch.store import Store
from runtime.batch.work import Work
from runtime.options import load_arguments, marking
from runtime.pipeline import Pipeline

__all__ = ["draw_on_cluster"]

PIECE = 32  # lines at most that an actor is given at once: as many are on their way together
DEATHS = 3  # of actors, before a piece is given up
NO_STATISTICS = "RAY_USAGE_STATS_ENABLED", "0"  # which Ray would send of clusters that it starts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collected:
    """A `Store` in memory; rows: name, file and record of each picture, or why there is none."""

    rows: list[tuple[str, bytes, str]] = field(default_factory=list)

    def add(self, name: str, data: bytes, record: Mapping[str, Any]) -> None:
        self.rows.append((name, data, json.dumps(record)))

    def lose(self, line: Line, picture: int | None, pictures: int) -> None:
        lost = {"number": line.number, "fields": line.fields, "error": line.error}
        self.rows.append(("", b"", json.dumps([lost, picture, pictures])))


class _Actor:
    """Draws pieces, on Ray's order; options: of the command, its backend chosen."""

    def __init__(
        self, options: argparse.Namespace, defaults: Defaults, made: Mapping[str, Any]
    ) -> None:
        self._pipeline = Pipeline.load(options.model, **load_arguments(options))
        self._options, self._defaults, self._made = options, defaults, made
        self._sign = marking(options)

    def __call__(self, piece: Any) -> Any:
        """Draw a table of `_packed` work; returns one with a row for each picture."""
        import pyarrow

        collected = _Collected()
        Batch(
            pipeline=self._pipeline,
            defaults=self._defaults,
            store=collected,
            made_with=self._made,
            ending=f".{self._options.format}",
            mark=self._options.mark,
            sign=self._sign,
            watermark=self._options.watermark,
            batch_size=self._options.batch_size,
        ).draw(_unpacked(text) for text in piece.column("work").to_pylist())
        names, files, records = zip(*collected.rows, strict=True)
        columns = {"name": names, "file": pyarrow.array(files, pyarrow.large_binary())}
        return pyarrow.table({**columns, "record": records})


def draw_on_cluster(
    work: Iterable[Work],
    store: Store,
    options: argparse.Namespace,
    defaults: Defaults,
    made_with: Mapping[str, Any],
) -> None:
    """Draw all on the cluster that RAY_ADDRESS names, on one of this machine where it does not.

    options: of the command, its backend and precision chosen; actors among them, None for one a
        GPU or a machine
    Raises BackendError where there is no such cluster, and where actors die or cannot begin; what
    is drawn by then is in the store.
    """
    import ray
    from ray import data

    lines = [{"work": _packed(each)} for each in work]
    if not lines:
        return
    try:
        if not ray.is_initialized():
            ray.init(**_connection())
    except (OSError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"there is no Ray cluster ({first_line(error)}); RAY_ADDRESS names one, and without it "
            "one is begun on this machine"
        ) from error
    data.DataContext.get_current().enable_progress_bars = False
    on_gpu = options.backend in ON_GPU
    found = int(ray.cluster_resources().get("GPU", 0)) if on_gpu else len(ray.nodes())
    actors = options.actors or max(found, 1)
    count = max(math.ceil(len(lines) / PIECE), min(actors, len(lines)))
    pieces = data.from_items(lines, override_num_blocks=count)
    drawn = pieces.map_batches(
        _Actor,
        fn_constructor_args=(options, defaults, made_with),
        compute=data.ActorPoolStrategy(size=actors),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
        ray_remote_args_fn=_remote,
    )
    try:
        for row in drawn.iter_rows():
            _put(store, row)
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"Ray could not draw ({first_line(error)}); what is drawn is kept, and the same "
            "command goes on"
        ) from error


def _remote() -> dict[str, Any]:
    return {
        "scheduling_strategy": "SPREAD",
        "max_restarts": DEATHS,
        "max_task_retries": DEATHS,
    }


def _connection() -> dict[str, Any]:
    """Return how to join a cluster, or to begin one that nobody reaches from elsewhere."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*NO_STATISTICS)
        quiet |= {
            "address": "local",
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    return quiet


def _put(store: Store, row: Mapping[str, Any]) -> None:
    record = json.loads(row["record"])
    if row["name"]:
        store.add(row["name"], row["file"], record)
        return
    line, picture, pictures = record
    store.lose(Line(**line), picture, pictures)


def _packed(work: Work) -> str:
    line = {"number": work.line.number, "fields": work.line.fields}
    return json.dumps([line, list(work.pictures), work.count, work.digest])


def _unpacked(text: str) -> Work:
    line, pictures, count, digest = json.loads(text)
    return Work(line=Line(**line), pictures=pictures, count=count, digest=digest)
