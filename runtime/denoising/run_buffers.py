"""What a run on a device uploads, and where each of its calls finds its inputs there."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape
from runtime.denoising.latents import State
from runtime.step_inputs import StepInputs

__all__ = ["ALIGNMENT", "Inputs", "NetInputs", "RunBuffers"]

BufferView = tuple[int, int | None, Shape]
"""Which array of a run; which row of it, None for all; and the shape."""
Inputs = dict[str, DeviceArray]
ALIGNMENT = 256  # bytes; where a tensor may begin in a device's memory
SMALL = 4096  # bytes of arrays that are told apart by what they hold
UNUSED = np.zeros(1, np.float32)


class NetInputs(NamedTuple):
    """What a ControlNet or a T2I-Adapter is given at a call beside the UNet's inputs.

    net: its name; weights: (N, g, B); hint: what was made of its pictures, (B, C, h, w) each
    """

    net: str
    weights: DeviceArray
    hint: Sequence[DeviceArray]


class _NetViews(NamedTuple):
    net: str
    weights: BufferView
    hint: tuple[BufferView, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunBuffers:
    """What a run uploads, and where each call finds its inputs in it.

    arrays: each once, however many calls use it; the first is what the registers start from. One
        that lies on the device, (1, C, h, w), is for all pictures.
    views: of every call, where each input is, by name; nets: where those of its nets are
    """

    arrays: list[HostOrDeviceArray]
    views: list[dict[str, BufferView]]
    nets: list[tuple[_NetViews, ...]]

    @classmethod
    def of(cls, state: State, steps: Sequence[StepInputs], *, tables: bool) -> "RunBuffers":
        """Collect what a run uploads; its noise is drawn here, all at once.

        tables: whether what differs from call to call is a row of one array for all calls
        """
        assert isinstance(state.registers, np.ndarray)
        arrays: list[HostOrDeviceArray] = [state.registers]
        index: dict[Hashable, int] = {}
        batch = len(state.registers)

        def view(array: HostOrDeviceArray, key: Hashable = None) -> BufferView:
            key = id(array) if key is None else key
            if key not in index:
                index[key] = len(arrays)
                arrays.append(array)
            return index[key], None, _shape_of(array, batch)

        def rows(each: Sequence[NDArray[Any]]) -> list[BufferView]:
            """Lay what the calls differ by into one array, if there are tables."""
            if not tables:
                keys = [(row.shape, row.dtype.str, row.tobytes()) for row in each]
                return [view(*found) for found in zip(each, keys, strict=True)]
            at, *_ = view(_aligned(each))
            return [(at, call, row.shape) for call, row in enumerate(each)]

        names = steps[0].per_step
        per_step = {name: rows([step.per_step[name] for step in steps]) for name in names}
        views = []
        for call, (step, noise) in enumerate(zip(steps, [*state.noise], strict=True)):
            given = {**step.told(state.constant), "noise": noise}
            found = {name: view(array, _key(name, array, step)) for name, array in given.items()}
            views.append(found | {name: table[call] for name, table in per_step.items()})

        def hint(array: HostOrDeviceArray) -> BufferView:
            if isinstance(array, DeviceArray):
                return view(array)
            return view(np.repeat(array, batch, axis=0), ("hint", id(array)))

        steered = [step.controls if step.is_steered else () for step in steps]
        weights = [[np.repeat(each.weights, batch, axis=2) for each in call] for call in steered]
        by_place = [rows(each) for each in zip_longest(*weights, fillvalue=UNUSED)]
        nets = [
            tuple(
                _NetViews(each.net, table[call], tuple(map(hint, state.hints[each.place])))
                for each, table in zip(controls, by_place, strict=False)
            )
            for call, controls in enumerate(steered)
        ]
        return cls(arrays=arrays, views=views, nets=nets)

    def form(self) -> Hashable:
        """Say what makes two runs use the same buffers in the same way."""
        shapes = tuple((array.shape, array.dtype.str) for array in self.arrays)
        views = tuple(tuple(sorted(found.items())) for found in self.views)
        return shapes, views, tuple(self.nets)

    def empty(self, device: Device) -> list[DeviceArray]:
        """Allocate memory for the arrays."""
        batch = self.arrays[0].shape[0]
        return [device.empty(_shape_of(array, batch), array.dtype) for array in self.arrays]

    def upload(self, device: Device, to: list[DeviceArray]) -> None:
        """Queue the copies of all arrays."""
        for array, buffer in zip(self.arrays, to, strict=True):
            if isinstance(array, DeviceArray):
                for picture in range(buffer.shape[0]):
                    device.copy(array[0], buffer[picture])
            else:
                device.upload(array, buffer)

    def inputs(self, call: int, uploaded: list[DeviceArray]) -> Inputs:
        """Return the inputs of a call, but for the registers and what calls before have made."""
        return {name: _seen(view, uploaded) for name, view in self.views[call].items()}

    def net_inputs(self, call: int, uploaded: list[DeviceArray]) -> list[NetInputs]:
        """Return what the nets are given that steer a call, in their order."""
        return [
            NetInputs(
                each.net,
                _seen(each.weights, uploaded),
                [_seen(view, uploaded) for view in each.hint],
            )
            for each in self.nets[call]
        ]

    def host_inputs(self, call: int, step: StepInputs, state: State) -> Mapping[str, Any]:
        """Return the inputs of a call as the processor has them, but for the registers."""
        noise = self.arrays[self.views[call]["noise"][0]]
        return {**step.conditioning, **state.constant, **step.per_step, "noise": noise}


def _seen(view: BufferView, uploaded: list[DeviceArray]) -> DeviceArray:
    at, row, shape = view
    return uploaded[at] if row is None else uploaded[at][row].head(shape)


def _shape_of(array: HostOrDeviceArray, batch: int) -> Shape:
    """Return the shape of an array as calls are given it."""
    return (batch, *array.shape[1:]) if isinstance(array, DeviceArray) else array.shape


def _key(name: str, array: NDArray[Any], step: StepInputs) -> Hashable:
    """Return what is equal in two inputs of calls that hold the same; of large ones by identity."""
    if array.nbytes <= SMALL:
        return name, array.shape, array.tobytes()
    if name == "edited_image":  # made for every call, of what is shown
        return name, step.conditioning["shown"].tobytes()
    return id(array)


def _aligned(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays as rows (N, m) that all begin where a tensor may."""
    width = max(row.size for row in rows)
    width += -width % (ALIGNMENT // rows[0].itemsize)
    table = np.zeros((len(rows), width), rows[0].dtype)
    for place, row in zip(table, rows, strict=True):
        place[: row.size] = row.ravel()
    return table
