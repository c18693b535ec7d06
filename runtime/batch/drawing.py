"""Requests drawn one beside the other: rows of unlike requests share calls, files are written.

What waits is planned when there is room for it, so the memory is that of the rows on their way.
Requests that name the same adapters are drawn without a pause between them; others wait until the
weights are theirs.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import BackendError, LatentrtError
from runtime.batch.requests import Defaults
from runtime.batch.store import Store
from runtime.batch.work import Work
from runtime.conditioning.names import AdapterTag
from runtime.denoising.row_loop import finished_rows
from runtime.denoising.rows import Row, rows_of
from runtime.finishing import check_watermark_fits
from runtime.images.files import FORMATS, Sign, encode_image, source_type_of
from runtime.images.watermark import embed_watermark
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.templates import expand_request

__all__ = ["Batch"]

AHEAD = 256  # requests that are looked at together, those of the same adapters first
MOST_BEGUN = 32  # rows on their way, among which there may be many buckets
MOST_UNWRITTEN = 8  # pictures that wait for the disk
DIGITS = 6  # of a line's number in its files' names
Adapters = tuple[AdapterTag, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """Where a row came from.

    limit: rows that its calls may have; began: on the clock of `time.monotonic`
    """

    work: Work
    index: int
    limit: int
    began: float


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Pictures on their way.

    store: takes them, and what is passed over
    made_with: what every file says beside its request
    ending: of the files, such as ".png"
    mark, sign: as `write_image` takes them; watermark: what every picture holds, or None
    batch_size: rows of a call, as `Pipeline.groups` takes it
    """

    pipeline: Pipeline
    defaults: Defaults
    store: Store
    made_with: Mapping[str, Any]
    ending: str
    mark: bool
    sign: Sign | None
    watermark: str | None
    batch_size: int | None
    _places: dict[Row, _Place] = field(default_factory=dict)
    _unwritten: deque[Future[None]] = field(default_factory=deque)
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    def draw(self, work: Iterable[Work]) -> None:
        """Draw all; what fails is told and passed over. Once.

        When it ends, however it ends, every picture that was finished is in the store. Raises what
        that raises, such as OutputError where nothing can be written.
        """
        with self._disk:
            for _, alike in groupby(self._by_adapters(work), lambda each: each[0]):
                for row in finished_rows(
                    self._rows(each for _, each in alike),
                    self.pipeline.step_rows,
                    self.pipeline.start,
                    lambda row: self._places[row].limit,
                    is_exact=self.pipeline.engines.is_exact,
                    most_begun=MOST_BEGUN,
                    failed=self._fail,
                ):
                    self._finish(row)
            self._wait(0)

    def _by_adapters(self, work: Iterable[Work]) -> Iterator[tuple[Adapters, Work]]:
        """Yield work with the adapters that it names, piece by piece in their order."""
        work, now = iter(work), Adapters()
        while piece := list(islice(work, AHEAD)):
            named = [(self._adapters(each), each) for each in piece]
            places = {
                each: i for i, each in enumerate(dict.fromkeys([now, *(n for n, _ in named)]))
            }
            named.sort(key=lambda each: places[each[0]])
            yield from named
            now, _ = named[-1]

    def _adapters(self, work: Work) -> Adapters:
        """Return the adapters that a request names, its alternatives chosen."""
        with suppress(LatentrtError):  # which its plan raises again
            request = self.defaults.request(work.line, with_pictures=False)
            if request.is_template:
                request, _ = expand_request(request, self.pipeline.wildcards)
            return request.adapters
        return Adapters()

    def _rows(self, work: Iterable[Work]) -> Iterator[Row]:
        """Plan requests, and yield the rows of their pictures."""
        for each in work:
            try:
                plan = self.pipeline.plan(self.defaults.request(each.line))
                limit = self.pipeline.batch_limit(plan, self.batch_size)
                rows = rows_of(plan)
                if self.watermark:
                    check_watermark_fits(plan)
            except LatentrtError as error:
                self._lose(each, error)
                continue
            for index in each.pictures:
                row = rows[index]
                self._places[row] = _Place(
                    work=each, index=index, limit=limit, began=time.monotonic()
                )
                yield row

    def _finish(self, row: Row) -> None:
        """Decode a finished row, and have it written."""
        try:
            if not np.isfinite(row.latents).all():
                raise BackendError("the model gave latents that are no numbers")
            (image,) = self.pipeline.finish(row.plan, self.pipeline.decode(row.latents, row.plan))
        except LatentrtError as error:
            self._fail(row, error)
            return
        self._wait(MOST_UNWRITTEN)
        place = self._places.pop(row)
        self._unwritten.append(self._disk.submit(self._write, place, row.plan, image))

    def _write(self, place: _Place, plan: Plan, image: Image.Image) -> None:
        """Make a picture's file and its record, and have both kept."""
        line, (settings,) = place.work.line, plan.settings
        number = f"-{place.index + 1}" if place.work.count > 1 else ""
        name = f"{line.number:0{DIGITS}}{number}{self.ending}"
        made = {**settings, **self.made_with}
        if place.limit > 1 and not self.pipeline.engines.is_exact:
            made["batch_size"] = place.limit  # which changes its bits
        if self.watermark:
            image = embed_watermark(image, self.watermark)
        kind = FORMATS[self.ending]
        data = encode_image(image, kind, made, mark=self.mark)
        if self.sign:
            data = self.sign(data, kind, source_type_of(image))
        record = {
            "line": line.number,
            "picture": place.index,
            "request": line.fields,
            "digest": place.work.digest,
            "seed": settings["seed"],
            "file": name,
            "hash": hashlib.sha256(data).hexdigest(),
            "seconds": round(time.monotonic() - place.began, 3),
            "error": None,
        }
        notes = {"notes": list(plan.notes)} if plan.notes else {}
        self.store.add(name, data, {**record, **notes})

    def _fail(self, row: Row, error: LatentrtError) -> None:
        place = self._places.pop(row)
        self._lose(place.work, error, place.index)

    def _lose(self, work: Work, error: LatentrtError, picture: int | None = None) -> None:
        """Have it kept why a line, or a picture of it, is passed over."""
        line = replace(work.line, error=str(error))
        self.store.lose(line, picture, len(work.pictures) if picture is None else 1)

    def _wait(self, most: int) -> None:
        """Wait until so few pictures are unwritten; raises what their writing raised."""
        while len(self._unwritten) > most:
            self._unwritten.popleft().result()
