"""What ControlNets add to the calls of the UNet: residuals, one net after the other.

Each net takes the residuals of those before it and adds its own, weighed by call, picture,
residual and group of guidance. Rows of one call may have other nets, or none: a net runs for the
rows that it steers alone, in each row's own order, so a row is what it is without the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Engine
from engine.configs.unet import UNetConfig
from engine.errors import RequestError
from engine.graphs.steering import residual_names
from engine.steering.control_nets import ControlNets, ControlPart
from runtime.control import Control
from runtime.plan import Plan
from runtime.step_inputs import StepInputs

__all__ = ["CallControl", "ControlledSteps", "Residuals", "call_controls", "hint_pixels"]

Array = NDArray[np.float32]
OPAQUE = 128  # of 255: where a hint's alpha is below, an inpainting ControlNet is to fill
# Inputs of a step that a ControlNet sees too, and whether they have groups before pictures.
SEEN: Mapping[str, bool] = {
    "registers": False,
    "timestep": False,
    "input_scale": False,
    "context": True,
    "text_embeds": True,
    "time_ids": True,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallControl:
    """What steers one picture at one call.

    net: the ControlNet's name; hint: (1, F, h, w); weights: (N, g, 1), by residual and group
    """

    net: str
    hint: Array
    weights: Array


def call_controls(step: StepInputs, hints: Sequence[Array]) -> list[CallControl]:
    """Return what steers each picture at a call; hints: (1, F, h, w) of each control."""
    return [
        CallControl(net=control.net, hint=hints[control.place], weights=control.weights)
        for control in step.controls
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlledSteps:
    """The ControlNets of a pipeline beside its UNet: hints of runs, residuals of calls."""

    unet: UNetConfig
    nets: ControlNets

    def check(self, controls: Sequence[Control]) -> None:
        """Raise RequestError for a net that there is not."""
        for control in controls:
            if control.net not in self.nets.names:
                known = ", ".join(map(repr, self.nets.names)) or "none"
                raise RequestError(
                    f"the control {control.net!r} is not loaded ({known} are); load it with "
                    "set_controls"
                )

    def hints(self, plan: Plan) -> tuple[Array, ...]:
        """Return what the nets make of a run's pictures, (1, F, h, w) each.

        A picture that the run gives the same net twice is encoded once.
        Raises GraphError or BackendError.
        """
        made: dict[tuple[str, int, str], Array] = {}
        hints = list[Array]()
        for control in plan.controls:
            key = control.net, id(control.image), control.preprocessor_text
            if key not in made:
                pixels = hint_pixels(control.shown(_over(plan, control.image)))
                made[key] = self._run(control.net, "control_hint", {"picture": pixels})["hint"]
            hints.append(made[key])
        return tuple(hints)

    def open(self, plan: Plan) -> None:
        """Open every engine that a run's controls need; raises GraphError or BackendError."""
        for control in plan.controls:
            for part in ("control_hint", "control"):
                self.nets.engine(control.net, part)

    def residuals(
        self, given: Mapping[str, Any], controls: Sequence[Sequence[CallControl]]
    ) -> dict[str, Array]:
        """Return what is added to the UNet's maps at a call: (g, B, C, h, w) a level, by name.

        given: the call's inputs; controls: of each of its rows. Raises BackendError.
        """
        residuals = self._none(given)
        for place in range(max(map(len, controls), default=0)):
            placed = {i: row[place] for i, row in enumerate(controls) if place < len(row)}
            for net in dict.fromkeys(control.net for control in placed.values()):
                rows = [i for i, control in placed.items() if control.net == net]
                chosen = [placed[i] for i in rows]
                inputs = {
                    **{
                        name: _taken(given[name], rows, axis=int(by_groups))
                        for name, by_groups in SEEN.items()
                        if name in given
                    },
                    "hint": np.concatenate([control.hint for control in chosen]),
                    "weights": np.concatenate([control.weights for control in chosen], axis=2),
                    **{name: _taken(array, rows, axis=1) for name, array in residuals.items()},
                }
                outputs = self._run(net, "control", inputs)
                for name, array in residuals.items():
                    array[:, rows] = outputs[f"next_{name}"]
        return residuals

    def _none(self, given: Mapping[str, Any]) -> dict[str, Array]:
        """Return residuals that add nothing, for a call with these inputs."""
        (groups, batch), (height, width) = given["context"].shape[:2], given["registers"].shape[3:]
        residuals = {}
        widths = zip(residual_names(self.unet), self.unet.residual_widths(), strict=True)
        for name, channels in widths:
            shape = groups, batch, sum(channels), height, width
            residuals[name] = np.zeros(shape, np.float32)
            height, width = (height + 1) // 2, (width + 1) // 2
        return residuals

    def _run(self, net: str, part: ControlPart, inputs: Mapping[str, Any]) -> dict[str, Any]:
        engine: Engine = self.nets.engine(net, part)
        return engine.run(inputs)


Residuals = Callable[[Mapping[str, Any], Sequence[Sequence[CallControl]]], dict[str, Array]]
"""As `ControlledSteps.residuals`."""


def _over(plan: Plan, image: Image.Image) -> Image.Image:
    """Return a control's picture as it lies over what is drawn, of the run's sides."""
    if plan.frame is not None:
        image = plan.frame.drawn(image)
    size = plan.width, plan.height
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def hint_pixels(image: Image.Image) -> Array:
    """Return a picture as a ControlNet sees it, (1, 3, H, W) from 0 to 1, -1 where transparent."""
    rgb = np.asarray(image.convert("RGB"), np.float32) / 255
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        rgb = np.where(alpha[..., None] < OPAQUE, np.float32(-1), rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])


def _taken(array: NDArray[Any], rows: Sequence[int], *, axis: int) -> NDArray[Any]:
    if list(rows) == list(range(array.shape[axis])):
        return array
    return np.ascontiguousarray(np.take(array, rows, axis=axis))
