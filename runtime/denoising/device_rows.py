"""Rows on a device: slots in arrays that stay, and a recorded graph for each number of them.

A call of n rows is made in the fewest of `SLOTS` that hold them; what the others still hold is
computed too, and dropped. What a row keeps from call to call (its texts, its mask) is uploaded when
it comes into a slot, and its registers are copied within the device. Every form of call, a bucket
and a number of slots, has arrays and a recording of its own, whatever is drawn between two calls.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import DeviceEngine
from engine.devices.device import DeviceArray, HostOrDeviceArray, Shape, within_memory
from runtime.denoising.device_loop import Recording
from runtime.denoising.rows import BY_GROUPS, BY_REGISTERS, Row, padded

__all__ = ["SLOTS", "DeviceRows"]

SLOTS = (1, 2, 4, 8, 16)
REGISTERS = 4  # of a slot, or a multiple, so that samplers share recordings
FORMS = 16  # whose arrays and recordings are kept
FLOAT32 = np.dtype(np.float32)
AT_EVERY_CALL = ("matrices", "outside", "timestep", "input_scale")  # uploaded for all rows at once
Inputs = Mapping[str, HostOrDeviceArray]


@dataclass(slots=True, kw_only=True, eq=False)
class Slots:
    """The arrays of one form of call, and the call once it is recorded.

    inputs: by name, with an axis of slots; outputs: the engine's
    silence: registers of a slot, all zero
    held: what was uploaded last, by name and slot
    """

    inputs: dict[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]
    silence: DeviceArray
    recording: Recording
    held: dict[tuple[str, int], NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: DeviceEngine, shapes: Mapping[str, Shape]) -> "Slots":
        """Allocate the arrays of calls of these shapes, which begin as zeros."""
        device, outputs = engine.device, engine.prepare(shapes)
        inputs = {name: device.empty(shape, FLOAT32) for name, shape in shapes.items()}
        silence = device.empty(shapes["registers"][1:], FLOAT32)
        for array in (silence, *inputs.values()):
            device.upload(np.zeros(array.shape, FLOAT32), array)
        recording = Recording(
            uploaded=[],
            registers=outputs["next_registers"],
            latents=outputs["next_registers"],
            work=lambda: engine.enqueue(inputs, outputs),
            records=engine.records,
        )
        return cls(inputs=inputs, outputs=outputs, silence=silence, recording=recording)

    def lay(self, rows: Sequence[Inputs]) -> None:
        """Queue the copies of all that differs from what the slots hold."""
        for slot, given in enumerate(rows):
            for name, array in given.items():
                if name not in AT_EVERY_CALL:
                    self._lay(name, slot, array)
        device, count = self.silence.device, self.silence.shape[0]
        for name in AT_EVERY_CALL:
            together = np.zeros(self.inputs[name].shape, FLOAT32)
            for slot, given in enumerate(rows):
                array = given[name]
                assert isinstance(array, np.ndarray)
                together[slot] = padded(name, array, count)[0]
            device.upload(together, self.inputs[name])

    def take(self, slot: int, registers: int, *, keeps_deep: bool) -> dict[str, DeviceArray]:
        """Queue copies of what a call has made for a slot, and return these."""
        device, outputs = self.silence.device, self.outputs
        made = outputs["next_registers"][slot]
        own = device.empty((1, registers, *made.shape[1:]), FLOAT32)
        device.copy(made.head(own.shape[1:]), own[0])
        taken = {"next_registers": own}
        if keeps_deep and "deep" in outputs:
            groups, _, *shape = outputs["deep"].shape
            taken["deep"] = device.empty((groups, 1, *shape), FLOAT32)
            for group in range(groups):
                device.copy(outputs["deep"][group][slot], taken["deep"][group][0])
        return taken

    def _lay(self, name: str, slot: int, array: HostOrDeviceArray) -> None:
        """Copy one input of a row into its slot; registers beyond its own are zeros there."""
        if isinstance(array, np.ndarray):
            if self.held.get((name, slot)) is array:
                return
            self.held[name, slot] = array
        device, whole = self.silence.device, self.inputs[name]
        if name in BY_GROUPS:
            places = [(array[group][0], whole[group][slot]) for group in range(whole.shape[0])]
        elif name == "registers":
            self.held.pop((name, slot), None)  # the next call makes others
            count = array.shape[1]
            places = [(array[0][at], whole[slot][at]) for at in range(count)]
            places += [(self.silence[at], whole[slot][at]) for at in range(count, whole.shape[1])]
        else:
            places = [(array[0], whole[slot])]
        for own, place in places:
            if isinstance(own, DeviceArray):
                device.copy(own, place)
            else:
                device.upload(np.asarray(own, FLOAT32), place)


@dataclass(slots=True, eq=False)
class DeviceRows:
    """Makes calls of rows on the device of a model's engines; its memory must have addresses."""

    _slots: OrderedDict[Hashable, Slots] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def reset(self) -> None:
        """Let go of arrays and of what was recorded, as when engines have changed."""
        with self._lock:
            self._slots.clear()

    def step(self, rows: Sequence[Row], engine: DeviceEngine, *, filled_to: int = 0) -> None:
        """Make the next call of rows of one bucket together; waits for it.

        engine: of their part; filled_to: slots that the call has at least
        Raises BackendError, and then every row is where it was.
        """
        given = [row.inputs() for row in rows]
        with self._lock:
            slots = self._find(given, engine, max(len(rows), filled_to))
            slots.lay(given)
            slots.recording.run(engine.device)
            made = [
                slots.take(at, inputs["registers"].shape[1], keeps_deep=row.keeps_deep)
                for at, (row, inputs) in enumerate(zip(rows, given, strict=True))
            ]
            engine.device.wait()
        for row, outputs in zip(rows, made, strict=True):
            row.advance(outputs)

    def _find(self, given: Sequence[Inputs], engine: DeviceEngine, count: int) -> Slots:
        """Return the slots of a form; of too many, the least recently used go."""
        number = next((each for each in SLOTS if each >= count), count)
        most = max(inputs["registers"].shape[1] for inputs in given)
        shapes = _shapes(given[0], number, -(-most // REGISTERS) * REGISTERS)
        form = id(engine), tuple(sorted(shapes.items()))
        if form not in self._slots:
            while len(self._slots) >= FORMS:
                self._slots.popitem(last=False)  # its memory goes before the next comes
            make = partial(Slots.of, engine, shapes)
            self._slots[form] = within_memory(make, self._slots.clear)
        self._slots.move_to_end(form)
        return self._slots[form]


def _shapes(given: Inputs, slots: int, registers: int) -> dict[str, Shape]:
    """Return the shapes of a call's inputs, from those of one row."""
    shapes: dict[str, Shape] = {}
    for name, array in given.items():
        if name in BY_GROUPS:
            shapes[name] = (array.shape[0], slots, *array.shape[2:])
        else:
            shapes[name] = (slots, *array.shape[1:])
    height, width = given["registers"].shape[-2:]
    channels = given["registers"].shape[2]
    by_registers = (
        (slots, registers, channels, height, width),
        (slots, registers, registers + 2),
        (slots, registers + 2),
    )
    assert {"registers", "matrices", "outside"} == BY_REGISTERS
    return {**shapes, **dict(zip(("registers", "matrices", "outside"), by_registers, strict=True))}
