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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import DeviceEngine, FindEngine, Run
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, within_memory
from engine.errors import BackendError
from runtime.denoising.latents import State
from runtime.denoising.run_buffers import Inputs, RunBuffers
from runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    from runtime.denoising.controls import ControlledSteps
    from runtime.denoising.device_controls import DeviceControls

__all__ = ["DeviceLoop", "Recording", "device_controls"]

log = logging.getLogger("latentrt.runtime")

FLOAT32 = np.dtype(np.float32)
FORMS = 8  # whose recordings are kept
TOLERANCE = 0.02  # of what a recording makes, beside the calls one by one; garbage is off by 1


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
        self,
        state: State,
        steps: Sequence[StepInputs],
        engine: FindEngine,
        controlled: "ControlledSteps | None" = None,
    ) -> Iterator[tuple[StepInputs, State]]:
        """Queue the calls one by one; yields each with the state after it.

        controlled: the nets beside the UNet, where a call is steered
        The registers are arrays of the device, and so is what nets have added; all other inputs
        that a state was given are the processor's.
        """
        device = _find(engine, steps[0]).device
        buffers = RunBuffers.of(state, steps, tables=device.has_addresses)
        nets = device_controls(controlled, device)
        uploaded = buffers.empty(device)
        buffers.upload(device, uploaded)
        state = replace(state, registers=uploaded[0])
        for call, inputs in enumerate(steps):
            given = buffers.inputs(call, uploaded)
            given["registers"] = _on_device(state.registers)
            if not inputs.is_full:
                given["deep"] = _on_device(state.deep)
                if inputs.is_controlled:
                    given["residuals_0"] = _on_device(state.residuals)
            elif nets is not None and inputs.is_steered:
                runs, added = nets.prepare(inputs, given, buffers.net_inputs(call, uploaded))
                given |= added
                for run in runs:
                    run.enqueue()
            chosen = _find(engine, inputs)
            outputs = chosen.prepare({name: array.shape for name, array in given.items()})
            chosen.enqueue(given, outputs)
            kept = {name: given[name] for name in given.keys() & {"registers", "residuals_0"}}
            host_inputs = buffers.host_inputs(call, inputs, state)
            state = state.after(outputs, {**host_inputs, **kept})
            yield inputs, state

    def finish(
        self,
        state: State,
        steps: Sequence[StepInputs],
        engine: FindEngine,
        controlled: "ControlledSteps | None" = None,
    ) -> HostOrDeviceArray:
        """Queue all calls; return the latents (B, C, h, w) that they make, of nobody else.

        controlled: as `steps` has it. On a device without addresses, waits for them.
        """
        device = _find(engine, steps[0]).device
        buffers = RunBuffers.of(state, steps, tables=device.has_addresses)
        engines = tuple(id(engine(step.part, step.variant)) for step in steps)
        with self._lock:
            recording = self._find(
                (buffers.form(), engines), lambda: _recording(buffers, steps, engine, controlled)
            )
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


def _recording(
    buffers: RunBuffers,
    steps: Sequence[StepInputs],
    engine: FindEngine,
    controlled: "ControlledSteps | None",
) -> Recording:
    """Allocate the buffers of all calls, and write down what is queued on them."""
    device = _find(engine, steps[0]).device
    nets = device_controls(controlled, device)
    uploaded = buffers.empty(device)
    first = uploaded[0]
    ends = [device.empty(first.shape, first.dtype) for _ in range(2)]
    prepared: dict[Hashable, Mapping[str, DeviceArray]] = {}
    kept: Inputs = {}  # by the last call that ran the whole UNet, for shallow ones
    queued: list[Run] = []
    registers = first
    for call, step in enumerate(steps):
        given = {**buffers.inputs(call, uploaded), "registers": registers}
        given |= {} if step.is_full else kept
        if nets is not None and step.is_steered:
            runs, added = nets.prepare(step, given, buffers.net_inputs(call, uploaded))
            given |= added
            queued += runs
        chosen = _find(engine, step)
        shapes = {name: array.shape for name, array in given.items()}
        form = (id(chosen), tuple(sorted(shapes.items())))
        if form not in prepared:
            prepared[form] = chosen.prepare(shapes)
        registers = ends[call % 2]
        outputs = {"next_registers": registers}
        if step.is_full:
            outputs["deep"] = prepared[form]["deep"]
            kept = {"deep": outputs["deep"]}
            if step.is_controlled:
                kept["residuals_0"] = given["residuals_0"]
        queued.append(Run(chosen, given, outputs))
    batch, _, *latent = first.shape
    latents = device.empty((batch, *latent), FLOAT32) if device.has_addresses else None

    def work() -> None:
        for run in queued:
            run.enqueue()
        if latents is not None:
            for image in range(batch):  # between two images' latents lie their other registers
                device.copy(registers[image][0], latents[image])

    records = all(run.engine.records for run in queued)
    return Recording(
        uploaded=uploaded, registers=registers, latents=latents, work=work, records=records
    )


def _find(engine: FindEngine, step: StepInputs) -> DeviceEngine:
    found = engine(step.part, step.variant)
    assert isinstance(found, DeviceEngine)
    return found


def device_controls(
    controlled: "ControlledSteps | None", device: Device
) -> "DeviceControls | None":
    """Return what gets nets ready that steer calls on a device, None where there are none."""
    if controlled is None:
        return None
    from runtime.denoising.device_controls import DeviceControls  # no plain prompt needs it

    return DeviceControls(steps=controlled, device=device)


def _on_device(array: HostOrDeviceArray | None) -> DeviceArray:
    assert isinstance(array, DeviceArray)
    return array
