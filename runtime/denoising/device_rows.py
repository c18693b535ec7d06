"""Rows on a device: slots in arrays that stay, and a recorded graph for each number of them.

A call of n rows is made in the fewest of `SLOTS` that hold them; what the others still hold is
computed too, and dropped. What a row keeps from call to call (its texts, its mask) is uploaded when
it comes into a slot, and its registers are copied within the device. Every form of call, a bucket
and a number of slots, has arrays and a recording of its own, whatever is drawn between two calls.

ControlNets and T2I-Adapters run for all slots: a row counts 0 for a net that does not steer it.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.backends.base import DeviceEngine, Run
from engine.devices.device import DeviceArray, HostOrDeviceArray, Shape, within_memory
from runtime.denoising.device_loop import Recording, device_controls
from runtime.denoising.rows import BY_GROUPS, BY_REGISTERS, DIRECTED, Row, padded
from runtime.denoising.run_buffers import NetInputs
from runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    from runtime.denoising.controls import CallControl, ControlledSteps

__all__ = ["SLOTS", "DeviceRows"]

SLOTS = (1, 2, 4, 8, 16)
REGISTERS = 4  # of a slot, or a multiple, so that samplers share recordings
FORMS = 16  # whose arrays and recordings are kept
FLOAT32 = np.dtype(np.float32)
FIRST_RESIDUALS = "residuals_0"  # what shallow calls take of them
Inputs = Mapping[str, HostOrDeviceArray]


class Link(NamedTuple):
    """A net that adds its own to a call, after those of the places before.

    place: of the control among those of its kind, for every row that the net steers there
    """

    is_adapter: bool
    place: int
    net: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """A call that rows of one bucket make together.

    step: of one of them; given: the inputs of each; steering: of each, by what steers it
    links: the nets that run before the UNet, in order
    """

    step: StepInputs
    given: Sequence[Inputs]
    steering: "Sequence[Mapping[Link, CallControl]]"
    links: Sequence[Link]

    @classmethod
    def of(cls, rows: Sequence[Row], controlled: "ControlledSteps | None") -> "Call":
        """Find what the next call of rows is; controlled: the nets, where it is steered."""
        steering: list[Mapping[Link, CallControl]] = [{} for _ in rows]
        if controlled is not None:
            steering = [_by_link(row.controls, controlled.nets.adapters) for row in rows]
        return cls(
            step=rows[0].next_step,
            given=[row.inputs() for row in rows],
            steering=steering,
            links=sorted({link for each in steering for link in each}),
        )

    def of_link(self, link: Link) -> "list[CallControl | None]":
        """Return what a net steers each row by, None where it does not."""
        return [each.get(link) for each in self.steering]


@dataclass(slots=True, kw_only=True, eq=False)
class Slots:
    """The arrays of one form of call, and the call once it is recorded.

    inputs: by name, with an axis of slots; outputs: the engine's, and what nets have added
    silence: registers of a slot, all zero; nets: what those are given that run before the UNet
    held: what was uploaded last, by name and slot
    """

    inputs: dict[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]
    silence: DeviceArray
    nets: list[NetInputs]
    recording: Recording
    held: dict[tuple[Hashable, int], HostOrDeviceArray] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        engine: DeviceEngine,
        shapes: Mapping[str, Shape],
        call: Call,
        controlled: "ControlledSteps | None",
    ) -> "Slots":
        """Allocate the arrays of calls of these shapes, which begin as zeros."""
        device = engine.device
        inputs = {name: device.empty(shape, FLOAT32) for name, shape in shapes.items()}
        silence = device.empty(shapes["registers"][1:], FLOAT32)
        nets, runs, added = list[NetInputs](), list[Run](), dict[str, DeviceArray]()
        prepared = device_controls(controlled, device)
        if prepared is not None:
            nets = [_net_inputs(link, call, engine, shapes["registers"][0]) for link in call.links]
            runs, added = prepared.prepare(call.step, inputs, nets)
        told = {**inputs, **added}
        outputs = engine.prepare({name: array.shape for name, array in told.items()})
        arrays = [silence, *inputs.values()]
        for net in nets:
            arrays += [net.weights, *net.hint]
        for array in arrays:
            device.upload(np.zeros(array.shape, FLOAT32), array)
        runs.append(Run(engine, told, outputs))

        def work() -> None:
            for run in runs:
                run.enqueue()

        recording = Recording(
            uploaded=[],
            registers=outputs["next_registers"],
            latents=outputs["next_registers"],
            work=work,
            records=all(run.engine.records for run in runs),
        )
        made = {**added, **outputs}
        return cls(inputs=inputs, outputs=made, silence=silence, nets=nets, recording=recording)

    def lay(self, call: Call) -> None:
        """Queue the copies of all that differs from what the slots hold."""
        at_every_call = call.step.per_step
        for slot, given in enumerate(call.given):
            for name, array in given.items():
                if name not in at_every_call:
                    self._lay(name, slot, array)
        device, count = self.silence.device, self.silence.shape[0]
        for name in at_every_call:
            together = np.zeros(self.inputs[name].shape, FLOAT32)
            for slot, given in enumerate(call.given):
                array = given[name]
                assert isinstance(array, np.ndarray)
                together[slot] = padded(name, array, count)[0]
            device.upload(together, self.inputs[name])
        for link, net in zip(call.links, self.nets, strict=True):
            self._steer(link, net, call.of_link(link))

    def _steer(self, link: Link, net: NetInputs, controls: "Sequence[CallControl | None]") -> None:
        """Give a net the hints of the rows that it steers, and how much it counts in each."""
        device, weights = self.silence.device, np.zeros(net.weights.shape, np.float32)
        for slot, control in enumerate(controls):
            if control is None:
                continue
            weights[..., slot] = control.weights[..., 0]
            for at, (own, whole) in enumerate(zip(control.hint, net.hint, strict=True)):
                if self._is_new((link, at), slot, own):
                    _copy(own[0], whole[slot])
        before = self.held.get((link, -1))
        if not isinstance(before, np.ndarray) or not np.array_equal(before, weights):
            self.held[link, -1] = weights
            device.upload(weights, net.weights)

    def _is_new(self, name: Hashable, slot: int, array: HostOrDeviceArray) -> bool:
        """Say whether a slot holds something else, and that it holds this now."""
        if self.held.get((name, slot)) is array:
            return False
        self.held[name, slot] = array
        return True

    def take(self, slot: int, registers: int, *, keeps_deep: bool) -> dict[str, DeviceArray]:
        """Queue copies of what a call has made for a slot, and return these."""
        device, outputs = self.silence.device, self.outputs
        made = outputs["next_registers"][slot]
        own = device.empty((1, registers, *made.shape[1:]), FLOAT32)
        device.copy(made.head(own.shape[1:]), own[0])
        taken = {"next_registers": own}
        for name in {"deep", FIRST_RESIDUALS} & outputs.keys() if keeps_deep else ():
            groups, _, *shape = outputs[name].shape
            taken[name] = device.empty((groups, 1, *shape), FLOAT32)
            for group in range(groups):
                device.copy(outputs[name][group][slot], taken[name][group][0])
        return taken

    def _lay(self, name: str, slot: int, array: HostOrDeviceArray) -> None:
        """Copy one input of a row into its slot; registers beyond its own are zeros there."""
        if name != "registers" and not self._is_new(name, slot, array):
            return
        whole = self.inputs[name]
        if name in BY_GROUPS:
            places = [(array[group][0], whole[group][slot]) for group in range(whole.shape[0])]
        elif name == "registers":
            count = array.shape[1]
            places = [(array[0][at], whole[slot][at]) for at in range(count)]
            places += [(self.silence[at], whole[slot][at]) for at in range(count, whole.shape[1])]
        else:
            places = [(array[0], whole[slot])]
        for own, place in places:
            _copy(own, place)


@dataclass(slots=True, eq=False)
class DeviceRows:
    """Makes calls of rows on the device of a model's engines; its memory must have addresses."""

    _slots: OrderedDict[Hashable, Slots] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def reset(self) -> None:
        """Let go of arrays and of what was recorded, as when engines have changed."""
        with self._lock:
            self._slots.clear()

    def step(
        self,
        rows: Sequence[Row],
        engine: DeviceEngine,
        *,
        filled_to: int = 0,
        controlled: "ControlledSteps | None" = None,
    ) -> None:
        """Make the next call of rows of one bucket together; waits for it.

        engine: of their part; filled_to: slots that the call has at least
        controlled: the nets beside the UNet, where the call is steered
        Raises BackendError, and then every row is where it was.
        """
        call = Call.of(rows, controlled)
        with self._lock:
            slots = self._find(call, engine, max(len(rows), filled_to), controlled)
            slots.lay(call)
            slots.recording.run(engine.device)
            made = [
                slots.take(at, inputs["registers"].shape[1], keeps_deep=row.keeps_deep)
                for at, (row, inputs) in enumerate(zip(rows, call.given, strict=True))
            ]
            engine.device.wait()
        for row, outputs in zip(rows, made, strict=True):
            if FIRST_RESIDUALS in outputs:  # the state after a call keeps what it was given
                row.inputs()[FIRST_RESIDUALS] = outputs.pop(FIRST_RESIDUALS)
            row.advance(outputs)

    def _find(
        self,
        call: Call,
        engine: DeviceEngine,
        count: int,
        controlled: "ControlledSteps | None",
    ) -> Slots:
        """Return the slots of a form; of too many, the least recently used go."""
        number = next((each for each in SLOTS if each >= count), count)
        most = max(inputs["registers"].shape[1] for inputs in call.given)
        shapes = _shapes(call.given[0], number, -(-most // REGISTERS) * REGISTERS)
        form = id(engine), tuple(sorted(shapes.items())), tuple(call.links)
        if form not in self._slots:
            while len(self._slots) >= FORMS:
                self._slots.popitem(last=False)  # its memory goes before the next comes
            make = partial(Slots.of, engine, shapes, call, controlled)
            self._slots[form] = within_memory(make, self._slots.clear)
        self._slots.move_to_end(form)
        return self._slots[form]


def _by_link(
    controls: "Sequence[CallControl]", adapters: Collection[str]
) -> "dict[Link, CallControl]":
    """Return a row's controls by their nets and places; adapters: T2I-Adapters' names."""
    found: dict[Link, CallControl] = {}
    for is_adapter in (False, True):
        kind = [each for each in controls if (each.net in adapters) == is_adapter]
        found |= {Link(is_adapter, place, each.net): each for place, each in enumerate(kind)}
    return found


def _net_inputs(link: Link, call: Call, engine: DeviceEngine, slots: int) -> NetInputs:
    """Allocate what a net is given in a number of slots."""
    control = next(filter(None, call.of_link(link)))
    counts, groups, _ = control.weights.shape
    return NetInputs(
        link.net,
        engine.device.empty((counts, groups, slots), FLOAT32),
        [engine.device.empty((slots, *own.shape[1:]), FLOAT32) for own in control.hint],
    )


def _copy(own: HostOrDeviceArray, place: DeviceArray) -> None:
    """Queue the copy of a row into its slot."""
    if isinstance(own, DeviceArray):
        place.device.copy(own, place)
    else:
        place.device.upload(np.asarray(own, FLOAT32), place)


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
    shapes |= dict(zip(("registers", "matrices", "outside"), by_registers, strict=True))
    for name in shapes.keys() & DIRECTED.keys():
        shapes[name] = (slots, registers + DIRECTED[name], *shapes[name][2:])
    return shapes
