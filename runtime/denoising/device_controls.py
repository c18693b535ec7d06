"""ControlNets and T2I-Adapters on a device, where what they add goes from net to net to the UNet.

Each takes what those before it have added and gives it with its own, as on the processor. At a call
that nets leave alone, and before the first, that is an array of zeros which nobody writes.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.backends.base import DeviceEngine, Run
from engine.devices.device import Device, DeviceArray
from engine.steering.control_nets import ControlPart
from runtime.denoising.controls import HINTS, SEEN, ControlledSteps
from runtime.denoising.run_buffers import Inputs, NetInputs
from runtime.step_inputs import StepInputs

__all__ = ["DeviceControls"]

FLOAT32 = np.dtype(np.float32)


@dataclass(slots=True, kw_only=True, eq=False)
class DeviceControls:
    """The arrays between the nets of calls that are queued one behind the other.

    Calls of one form have the same, so each reads what its own nets have left, before the next.
    """

    steps: ControlledSteps
    device: Device
    _outputs: dict[Hashable, Mapping[str, DeviceArray]] = field(default_factory=dict)
    _zeros: dict[Hashable, DeviceArray] = field(default_factory=dict)

    def prepare(
        self, step: StepInputs, given: Inputs, nets: Sequence[NetInputs]
    ) -> tuple[list[Run], Inputs]:
        """Get ready for the nets of a call: their runs, in order, and what they add to the UNet's.

        given: inputs of the UNet; nets: those that steer the call. Raises BackendError.
        """
        runs, added = list[Run](), Inputs()
        if step.is_controlled:
            residuals = self._zero(self.steps.residual_shapes(given))
            seen = {name: given[name] for name in SEEN if name in given}
            for place, net in enumerate(self._of_kind(nets, are_adapters=False)):
                own = {**seen, **dict(zip(HINTS, net.hint, strict=False))}
                runs.append(self._run(net, "control", own, residuals, place))
                residuals = _next(residuals, runs[-1])
            added |= residuals
        if step.is_adapted:
            features = self._zero(self.steps.feature_shapes(given))
            for place, net in enumerate(self._of_kind(nets, are_adapters=True)):
                own = {f"own_{name}": hint for name, hint in zip(features, net.hint, strict=False)}
                sums = {name: features[name] for name in features if f"own_{name}" in own}
                runs.append(self._run(net, "feature_sum", own, sums, place))
                features |= _next(sums, runs[-1])
            added |= features
        return runs, added

    def _of_kind(self, nets: Sequence[NetInputs], *, are_adapters: bool) -> list[NetInputs]:
        adapters = self.steps.nets.adapters
        return [each for each in nets if (each.net in adapters) == are_adapters]

    def _run(self, net: NetInputs, part: ControlPart, own: Inputs, sums: Inputs, place: int) -> Run:
        """Get a net ready to add its own to what was added before."""
        engine = self.steps.nets.engine(net.net, part)
        assert isinstance(engine, DeviceEngine)
        inputs = {**own, "weights": net.weights, **sums}
        shapes = {name: array.shape for name, array in inputs.items()}
        # Two runs of one net have other arrays where one reads what the other has made.
        key = id(engine), place % 2, tuple(sorted(shapes.items()))
        if key not in self._outputs:
            self._outputs[key] = engine.prepare(shapes)
        return Run(engine, inputs, self._outputs[key])

    def _zero(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        for key in shapes.items():
            if key not in self._zeros:
                self._zeros[key] = self.device.empty(key[1], FLOAT32)
                self.device.upload(np.zeros(key[1], FLOAT32), self._zeros[key])
        return {name: self._zeros[name, shape] for name, shape in shapes.items()}


def _next(sums: Inputs, run: Run) -> Inputs:
    return {name: run.outputs[f"next_{name}"] for name in sums}
