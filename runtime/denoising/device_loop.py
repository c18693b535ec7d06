"""The loop with everything on a device: uploaded once a picture, then queued without waiting.

Step by step, every call has outputs of its own, which whoever watches may read when they like. A
run that nobody watches sends its registers to and fro between two buffers; when others of its form
follow, the buffers are filled anew and all calls are launched as one recorded graph. On a device
without addresses, what differs from call to call is an array for each call, uploaded once where
calls have the same, and the finished latents come back to the processor.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import DeviceEngine, Engine
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, within_memory
from engine.errors import BackendError
from engine.graphs.graph import Part
from runtime.denoising.latents import State
from runtime.plan import StepInputs

log = logging.getLogger("latentrt.runtime")

BufferView = tuple[int, int | None, tuple[int, ...]]
"""Which array of a run; which row of it, None for all; and the shape."""
Inputs = dict[str, DeviceArray]
FindEngine = Callable[[Part], Engine]
FLOAT32 = np.dtype(np.float32)
FORMS = 8  # whose recordings are kept
TOLERANCE = 0.02  # of what a recording makes, beside the calls one by one; garbage is off by 1
ALIGNMENT = 256  # bytes; where a tensor may begin in a device's memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunBuffers:
    """What a run uploads, and where each call finds its inputs in it.

    arrays: each once, however many calls use it; the first is what the registers start from
    views: of every call, where each input is, by name
    """

    arrays: list[NDArray[Any]]
    views: list[dict[str, BufferView]]

    @classmethod
    def of(cls, state: State, steps: Sequence[StepInputs], *, tables: bool) -> "RunBuffers":
        """Collect what a run uploads; its noise is drawn here, all at once.

        tables: whether what differs from call to call is a row of one array for all calls
        """
        assert isinstance(state.registers, np.ndarray)
        arrays: list[NDArray[Any]] = [state.registers]
        index: dict[Hashable, int] = {}

        def view(array: NDArray[Any], key: Hashable = None) -> BufferView:
            key = id(array) if key is None else key
            if key not in index:
                index[key] = len(arrays)
                arrays.append(array)
            return index[key], None, array.shape

        stacked = {}
        for name in steps[0].per_step if tables else ():
            stacked[name] = view(_aligned(np.stack([step.per_step[name] for step in steps])))[0]
        views = []
        for call, (step, noise) in enumerate(zip(steps, [*state.noise], strict=True)):
            given = {**step.conditioning, **state.constant, "noise": noise}
            found = {name: view(array) for name, array in given.items()}
            for name, row in step.per_step.items():
                if tables:
                    found[name] = stacked[name], call, row.shape
                else:
                    found[name] = view(row, (row.shape, row.dtype.str, row.tobytes()))
            views.append(found)
        return cls(arrays=arrays, views=views)

    def form(self) -> Hashable:
        """Say what makes two runs use the same buffers in the same way."""
        shapes = tuple((array.shape, array.dtype.str) for array in self.arrays)
        return shapes, tuple(tuple(sorted(found.items())) for found in self.views)

    def empty(self, device: Device) -> list[DeviceArray]:
        """Allocate memory for the arrays."""
        return [device.empty(array.shape, array.dtype) for array in self.arrays]

    def upload(self, device: Device, to: list[DeviceArray]) -> None:
        """Queue the copies of all arrays."""
        for array, buffer in zip(self.arrays, to, strict=True):
            device.upload(array, buffer)

    def inputs(self, call: int, uploaded: list[DeviceArray]) -> Inputs:
        """Return the inputs of a call, but for the registers and deep features."""
        return {
            name: uploaded[at] if row is None else uploaded[at][row].head(shape)
            for name, (at, row, shape) in self.views[call].items()
        }


@dataclass(slots=True, kw_only=True, eq=False)
class Recording:
    """The buffers of runs of one form, and their calls once they are recorded.

    registers: those of the last call; latents: where these leave the latents, None on a device
        without addresses
    work: queues all calls; launch: the same, recorded; is_proven: whether it made the same latents
    records: whether all engines may be recorded, and it has not failed
    scratch: the address of the memory that engines share, None before they chose what they need
    """

    uploaded: list[DeviceArray]
    registers: DeviceArray
    latents: DeviceArray | None
    work: Callable[[], None]
    records: bool
    launch: Callable[[], None] | None = None
    is_proven: bool = False
    scratch: int | None = None

    def run(self, device: Device) -> None:
        """Queue the calls: twice one by one, then both ways, then as a graph.

        The second run is recorded. What was recorded is believed once it made what the calls one by
        one make of the third run's inputs; where it does not, or cannot be recorded, calls stay one
        by one, and the log says why.
        """
        scratch = device.scratch(0).address
        if self.launch is not None and self.scratch == scratch:
            self._launch(device, self.launch)
            return
        self.work()
        if self.records and self.scratch is not None:
            self.launch = self._record(device)
            self.is_proven = False
        self.scratch = device.scratch(0).address  # engines choose what they need in the first run

    def _launch(self, device: Device, launch: Callable[[], None]) -> None:
        launch()
        if self.is_proven:
            return
        assert self.latents is not None  # without addresses nothing is recorded
        found = device.download(self.latents)
        self.work()
        expected = device.download(self.latents)
        self.is_proven = _agree(found, expected)
        if not self.is_proven:
            self._give_up("what was recorded makes other latents than the calls one by one")

    def _record(self, device: Device) -> Callable[[], None] | None:
        try:
            return device.record(self.work)
        except BackendError as error:
            self._give_up(str(error))
        try:  # an error of the recording may be told once more to whatever is queued next
            self.work()
        except BackendError:
            self.work()
        return None

    def _give_up(self, reason: str) -> None:
        self.records, self.launch = False, None
        log.warning("a run is queued call by call and not recorded as a graph: %s", reason)


def _agree(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Say whether two runs made the same, but for what sums in another order come to."""
    difference = np.linalg.norm((found - expected).ravel())
    return bool(difference <= TOLERANCE * np.linalg.norm(expected.ravel()))


@dataclass(slots=True, eq=False)
class DeviceLoop:
    """Runs calls on the device of a model's engines.

    The recordings of several forms are kept, as of several numbers of pictures.
    """

    _recordings: OrderedDict[Hashable, Recording] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def reset(self) -> None:
        """Let go of buffers and of what was recorded, as when engines have changed."""
        with self._lock:
            self._recordings.clear()

    def steps(
        self, state: State, steps: Sequence[StepInputs], engine: FindEngine
    ) -> Iterator[tuple[StepInputs, State]]:
        """Queue the calls one by one; yields each with the state after it.

        The registers are arrays of the device; all other inputs that a state was given are the
        processor's.
        """
        device = _find(engine, "step").device
        buffers = RunBuffers.of(state, steps, tables=device.has_addresses)
        uploaded = buffers.empty(device)
        buffers.upload(device, uploaded)
        state = replace(state, registers=uploaded[0])
        for call, inputs in enumerate(steps):
            given = buffers.inputs(call, uploaded)
            given["registers"] = _on_device(state.registers)
            if not inputs.is_full:
                given["deep"] = _on_device(state.deep)
            chosen = _find(engine, inputs.part)
            outputs = chosen.prepare({name: array.shape for name, array in given.items()})
            chosen.enqueue(given, outputs)
            noise = buffers.arrays[buffers.views[call]["noise"][0]]
            host_inputs = {
                **inputs.conditioning,
                **state.constant,
                **inputs.per_step,
                "noise": noise,
                "registers": state.registers,
            }
            state = state.after(outputs, host_inputs)
            yield inputs, state

    def finish(
        self, state: State, steps: Sequence[StepInputs], engine: FindEngine
    ) -> HostOrDeviceArray:
        """Queue all calls; return the latents (B, C, h, w) that they make, of nobody else.

        On a device without addresses, waits for them.
        """
        device = _find(engine, "step").device
        buffers = RunBuffers.of(state, steps, tables=device.has_addresses)
        engines = tuple(id(engine(part)) for part in sorted({step.part for step in steps}))
        form = (buffers.form(), tuple(step.is_full for step in steps), engines)
        with self._lock:
            recording = self._find(form, lambda: _recording(buffers, steps, engine))
            buffers.upload(device, recording.uploaded)
            recording.run(device)
            if recording.latents is None:
                return np.ascontiguousarray(device.download(recording.registers)[:, 0])
            latents = device.empty(recording.latents.shape, FLOAT32)
            device.copy(recording.latents, latents)
        return latents

    def _find(self, form: Hashable, make: Callable[[], Recording]) -> Recording:
        """Return the recording of a form; of too many, the least recently used goes."""
        if form not in self._recordings:
            while len(self._recordings) >= FORMS:
                self._recordings.popitem(last=False)  # its memory goes before the next comes
            self._recordings[form] = within_memory(make, self._recordings.clear)
        self._recordings.move_to_end(form)
        return self._recordings[form]


def _recording(buffers: RunBuffers, steps: Sequence[StepInputs], engine: FindEngine) -> Recording:
    """Allocate the buffers of all calls, and write down what is queued on them."""
    device = _find(engine, "step").device
    uploaded = buffers.empty(device)
    first = uploaded[0]
    ends = [device.empty(first.shape, first.dtype) for _ in range(2)]
    prepared: dict[Hashable, Mapping[str, DeviceArray]] = {}
    deep: Inputs = {}
    queued: list[tuple[DeviceEngine, Inputs, Inputs]] = []
    registers = first
    for call, step in enumerate(steps):
        given = {**buffers.inputs(call, uploaded), "registers": registers}
        given |= {} if step.is_full else deep
        shapes = {name: array.shape for name, array in given.items()}
        form = (step.part, tuple(sorted(shapes.items())))
        if form not in prepared:
            prepared[form] = _find(engine, step.part).prepare(shapes)
        if step.is_full:
            deep = {"deep": prepared[form]["deep"]}
        registers = ends[call % 2]
        outputs = {"next_registers": registers, **(deep if step.is_full else {})}
        queued.append((_find(engine, step.part), given, outputs))
    batch, _, *latent = first.shape
    latents = device.empty((batch, *latent), FLOAT32) if device.has_addresses else None

    def work() -> None:
        for chosen, inputs, outputs in queued:
            chosen.enqueue(inputs, outputs)
        if latents is not None:
            for image in range(batch):  # between two images' latents lie their other registers
                device.copy(registers[image][0], latents[image])

    records = all(chosen.records for chosen, *_ in queued)
    return Recording(
        uploaded=uploaded, registers=registers, latents=latents, work=work, records=records
    )


def _find(engine: FindEngine, part: Part) -> DeviceEngine:
    found = engine(part)
    assert isinstance(found, DeviceEngine)
    return found


def _on_device(array: HostOrDeviceArray | None) -> DeviceArray:
    assert isinstance(array, DeviceArray)
    return array


def _aligned(table: NDArray[Any]) -> NDArray[Any]:
    """Return a table (N, ...) as rows (N, m) that all begin where a tensor may."""
    rows = table.reshape(len(table), -1)
    padding = -rows.shape[1] % (ALIGNMENT // table.itemsize)
    return np.pad(rows, ((0, 0), (0, padding)))
