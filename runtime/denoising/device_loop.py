"""The loop with everything on a device: uploaded once a picture, then queued without waiting.

Step by step, every call has outputs of its own, which whoever watches may read when they like. A
run that nobody watches sends its registers to and fro between two buffers; when the next has its
form, the buffers are filled anew and all calls are launched as one recorded graph.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import Device, DeviceArray, DeviceEngine
from engine.errors import BackendError
from engine.graphs.signature import Part
from runtime.denoising.host_loop import Calls

Place = tuple[int, int | None, tuple[int, ...]]
Placed = dict[str, DeviceArray]
Engines = Callable[[Part], DeviceEngine]
FLOAT32 = np.dtype(np.float32)
ALIGNMENT = 256  # bytes; where a tensor may begin in a device's memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """What a run uploads, and where each call finds its inputs in it.

    arrays: each once, however many calls use it; the first is what the registers start from
    places: of every call, by name: which array; which row of it, None for all; and the shape
    """

    arrays: list[NDArray[Any]]
    places: list[dict[str, Place]]

    @classmethod
    def of(cls, calls: Calls) -> "Contents":
        """Collect what a run uploads; its noise is drawn here, all at once."""
        arrays: list[NDArray[Any]] = [calls.registers]
        index: dict[int, int] = {}

        def place(array: NDArray[Any]) -> Place:
            if id(array) not in index:
                index[id(array)] = len(arrays)
                arrays.append(array)
            return index[id(array)], None, array.shape

        tables = {name: place(_aligned(table))[0] for name, table in calls.tables.items()}
        places = []
        for call, noise in enumerate([*calls.fresh()]):
            given = {**calls.told[call], **calls.constant, "noise": noise}
            rows = {name: (at, call, calls.tables[name].shape[1:]) for name, at in tables.items()}
            places.append({**{name: place(array) for name, array in given.items()}, **rows})
        return cls(arrays=arrays, places=places)

    def form(self) -> Hashable:
        """Say what makes two runs use the same buffers in the same way."""
        shapes = tuple((array.shape, array.dtype.str) for array in self.arrays)
        return shapes, tuple(tuple(sorted(found.items())) for found in self.places)

    def empty(self, device: Device) -> list[DeviceArray]:
        """Allocate memory for the arrays."""
        return [device.empty(array.shape, array.dtype) for array in self.arrays]

    def upload(self, device: Device, to: list[DeviceArray]) -> None:
        """Queue the copies of all arrays."""
        for array, place in zip(self.arrays, to, strict=True):
            device.upload(array, place)

    def inputs(self, call: int, uploaded: list[DeviceArray]) -> Placed:
        """Return what a call is told, but for the registers and deep features."""
        return {
            name: uploaded[at] if row is None else uploaded[at][row].head(shape)
            for name, (at, row, shape) in self.places[call].items()
        }


@dataclass(slots=True, kw_only=True, eq=False)
class Recording:
    """The buffers of runs of one form, and their calls once they are recorded.

    work: queues all calls; launch: the same, recorded if it can be
    scratch: the address that it was recorded with, of the memory that engines share
    """

    uploaded: list[DeviceArray]
    latents: DeviceArray
    work: Callable[[], None]
    launch: Callable[[], None] | None = None
    scratch: int | None = None

    def run(self, device: Device) -> None:
        """Queue the calls: the first time one by one, later as a graph.

        Where an engine does what cannot be recorded, one by one every time.
        """
        scratch = device.scratch(0).address
        if self.scratch is None:  # engines choose what they need at their first run
            self.work()
            self.scratch = device.scratch(0).address
            return
        if self.launch is None or self.scratch != scratch:
            self.scratch = scratch
            try:
                self.launch = device.record(self.work)
            except BackendError:
                self.launch = self.work
        self.launch()


@dataclass(slots=True, eq=False)
class DeviceLoop:
    """Runs calls on the device of a model's engines."""

    _form: Hashable = None
    _recording: Recording | None = None
    _lock: Lock = field(default_factory=Lock)

    def forget(self) -> None:
        """Let go of buffers and of what was recorded, as when engines have changed."""
        with self._lock:
            self._form = self._recording = None

    def steps(self, calls: Calls, engine: Engines) -> Iterator[tuple[dict[str, Any], DeviceArray]]:
        """Queue the calls one by one; yields what each was told and the registers that it makes.

        What it was told are the processor's arrays, but for the registers before it.
        """
        device, contents = engine("step").device, Contents.of(calls)
        uploaded = contents.empty(device)
        contents.upload(device, uploaded)
        registers, deep = uploaded[0], None
        for call, whole in enumerate(calls.whole):
            given = {**contents.inputs(call, uploaded), "registers": registers}
            if deep is not None and not whole:
                given["deep"] = deep
            chosen = engine("step" if whole else "step_shallow")
            outputs = chosen.prepare({name: array.shape for name, array in given.items()})
            chosen.enqueue(given, outputs)
            noise = contents.arrays[contents.places[call]["noise"][0]]
            told = {**calls.inputs(call), "noise": noise, "registers": registers}
            registers, deep = outputs["next_registers"], outputs.get("deep", deep)
            yield told, registers

    def finish(self, calls: Calls, engine: Engines) -> DeviceArray:
        """Queue all calls; return the latents (B, C, h, w) that they make, of nobody else."""
        device, contents = engine("step").device, Contents.of(calls)
        parts: set[Part] = {"step" if whole else "step_shallow" for whole in calls.whole}
        engines = tuple(id(engine(part)) for part in sorted(parts))
        form = (contents.form(), tuple(calls.whole), engines)
        with self._lock:
            if self._recording is None or self._form != form:
                self._form = self._recording = None  # its memory goes before the next comes
                self._recording, self._form = _recording(calls, contents, engine), form
            contents.upload(device, self._recording.uploaded)
            self._recording.run(device)
            latents = device.empty(self._recording.latents.shape, FLOAT32)
            device.copy(self._recording.latents, latents)
        return latents


def _recording(calls: Calls, contents: Contents, engine: Engines) -> Recording:
    """Allocate the buffers of all calls, and write down what is queued on them."""
    device = engine("step").device
    uploaded = contents.empty(device)
    first = uploaded[0]
    buffers = [device.empty(first.shape, first.dtype) for _ in range(2)]
    prepared: dict[Hashable, Mapping[str, DeviceArray]] = {}
    deep: Placed = {}
    queued: list[tuple[Part, Placed, Placed]] = []
    registers = first
    for call, whole in enumerate(calls.whole):
        part: Part = "step" if whole else "step_shallow"
        given = {**contents.inputs(call, uploaded), "registers": registers}
        given |= {} if whole else deep
        shapes = {name: array.shape for name, array in given.items()}
        form = (part, tuple(sorted(shapes.items())))
        if form not in prepared:
            prepared[form] = engine(part).prepare(shapes)
        if whole:
            deep = {"deep": prepared[form]["deep"]}
        registers = buffers[call % 2]
        queued.append((part, given, {"next_registers": registers, **(deep if whole else {})}))
    batch, _, *latent = first.shape
    latents = device.empty((batch, *latent), FLOAT32)

    def work() -> None:
        for part, inputs, outputs in queued:
            engine(part).enqueue(inputs, outputs)
        for picture in range(batch):  # between two pictures' latents lie their other registers
            device.copy(registers[picture][0], latents[picture])

    return Recording(uploaded=uploaded, latents=latents, work=work)


def _aligned(table: NDArray[Any]) -> NDArray[Any]:
    """Return a table (N, ...) as rows (N, m) that all begin where a tensor may."""
    rows = table.reshape(len(table), -1)
    padding = -rows.shape[1] % (ALIGNMENT // table.itemsize)
    return np.pad(rows, ((0, 0), (0, padding)))
