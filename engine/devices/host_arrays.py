"""Runs of a device's engine on the processor's arrays: up, once through, down again."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from engine.devices.device import DeviceArray, DeviceEngine

Given = Mapping[str, NDArray[Any] | DeviceArray]


def run_from_host(engine: DeviceEngine, inputs: Given) -> dict[str, NDArray[Any]]:
    """Run an engine once; inputs may lie on either side, and what comes back is the processor's.

    Raises BackendError.
    """
    device, placed = engine.device, {}
    for name, array in inputs.items():
        if isinstance(array, DeviceArray):
            placed[name] = array
        else:
            placed[name] = device.empty(array.shape, array.dtype)
            device.upload(array, placed[name])
    outputs = engine.prepare({name: array.shape for name, array in placed.items()})
    engine.enqueue(placed, outputs)
    return {name: device.download(array) for name, array in outputs.items()}
