"""What ControlNets and T2I-Adapters add to the calls of the UNet.

A T2I-Adapter sees a picture once a run: its features are weighed and summed for every call. A
ControlNet gives residuals at every call: each net takes those of the nets before it and adds its
own, weighed by call, picture, residual and group of guidance. Rows of one call may have other
nets, or none: a net runs for the rows that it steers alone, in each row's own order, so a row is
what it is without the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import DeviceEngine, Engine, enqueue_from_host
from engine.configs.t2i_adapter import adapted_places
from engine.configs.unet import UNetConfig
from engine.devices.device import HostOrDeviceArray, Shape, on_host
from engine.errors import RequestError
from engine.graphs.steering import feature_names, residual_names
from engine.steering.control_nets import ControlNets, ControlPart
from runtime.control import Control, control_fields
from runtime.control_types import check_type, control_types
from runtime.plan import Plan
from runtime.step_inputs import StepInputs
from runtime.variants import with_features

__all__ = ["CallControl", "ControlledSteps", "Residuals", "call_controls", "hint_pixels"]

Array = NDArray[np.float32]
OPAQUE = 128  # of 255: where a hint's alpha is below, an inpainting ControlNet is to fill
HINTS = ("hint", "type_embedding")  # what a ControlNet makes of a picture, a union both
HOLE, UNION_HOLE = -1.0, 0.0  # what it sees there, and what a union does
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

    net: its name; hint: what it made of its picture, where it runs: a ControlNet one array
        (1, F, h, w), a union of them one more, of the picture's type (1, Y), a T2I-Adapter its
        features (1, C, h, w)
    weights: (N, g, 1), by residual or feature and group of guidance
    """

    net: str
    hint: Sequence[HostOrDeviceArray]
    weights: Array


def call_controls(
    step: StepInputs, hints: Sequence[Sequence[HostOrDeviceArray]]
) -> list[CallControl]:
    """Return what steers each picture at a call; hints: (1, C, h, w) arrays of each control."""
    return [
        CallControl(net=control.net, hint=hints[control.place], weights=control.weights)
        for control in step.controls
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlledSteps:
    """The ControlNets and T2I-Adapters beside a pipeline's UNet: hints of runs, sums of calls."""

    unet: UNetConfig
    nets: ControlNets

    def completed(self, controls: Sequence[Control]) -> list[Control]:
        """Return controls that say how their hints are made, where their nets' files do.

        Raises RequestError for a net that there is not, or a type of picture that it has not.
        """
        said, types = [], self.nets.control_types
        for control in controls:
            if control.net not in self.nets.names:
                known = ", ".join(map(repr, self.nets.names)) or "none"
                raise RequestError(
                    f"the control {control.net!r} is not loaded ({known} are); load it with "
                    "set_controls"
                )
            said.append(control.or_else(self.nets.preprocessor(control.net)))
            check_type(said[-1], types.get(control.net, 0))
        return said

    def steered(self, plan: Plan) -> Plan:
        """Return a plan that says how its controls steer every call, with the run that follows."""
        if plan.hires is not None:
            plan = replace(plan, hires=self.steered(plan.hires))
        adapters = {name: len(each.channels) for name, each in self.nets.adapters.items()}
        residuals = sum(map(len, self.unet.residual_widths()))
        run = plan.conditioning, plan.prompts
        fields = control_fields(plan.controls, adapters, residuals, *run, pooled=self.nets.pooled)
        if any(control.net in adapters for control in fields["controls"]):
            fields["variants"] = with_features(plan.variants)
        return replace(plan, **fields)

    def hints(self, plan: Plan) -> tuple[Sequence[HostOrDeviceArray], ...]:
        """Return what the nets make of a run's pictures, (1, C, h, w) arrays for each control.

        They stay on a device whose arrays have rows. A picture that the run gives the same net
        twice is encoded once. Raises GraphError or BackendError.
        """
        made: dict[tuple[str, int, str, str | None], Sequence[HostOrDeviceArray]] = {}
        hints = list[Sequence[HostOrDeviceArray]]()
        for control in plan.controls:
            key = control.net, id(control.image), control.preprocessor_text, control.type
            if key not in made:
                made[key] = self._hint(control, control.shown(_over(plan, control.image)))
            hints.append(made[key])
        return tuple(hints)

    def open(self, plan: Plan) -> None:
        """Open every engine that a run's controls need; raises GraphError or BackendError."""
        for control in plan.controls:
            if control.net in self.nets.adapters:
                self.nets.engine(control.net, "t2i_adapter")
                continue
            for part in ("control_hint", "control"):
                self.nets.engine(control.net, part)

    def added(
        self,
        step: StepInputs,
        given: Mapping[str, Any],
        controls: Sequence[Sequence[CallControl]],
    ) -> dict[str, Array]:
        """Return what is added to the UNet's maps at a call: (g, B, C, h, w), by name.

        step, given: the call and its inputs; controls: of each of its rows. Raises BackendError.
        """
        kinds = self.nets.adapters
        added = dict[str, Array]()
        if step.is_controlled:
            nets = [[each for each in row if each.net not in kinds] for row in controls]
            added |= self._residuals(given, nets)
        if step.is_adapted:
            adapters = [[each for each in row if each.net in kinds] for row in controls]
            added |= self._features(given, adapters)
        return added

    def _features(
        self, given: Mapping[str, Any], controls: Sequence[Sequence[CallControl]]
    ) -> dict[str, Array]:
        """Sum the features of every row's T2I-Adapters, weighed: (g, B, C, h, w) a place."""
        features = _zeros(self.feature_shapes(given))
        for row, steering in enumerate(controls):
            for control in steering:
                hint = map(on_host, control.hint)
                made = zip(features.values(), hint, control.weights, strict=False)
                for array, feature, weights in made:
                    array[:, row] += weights[..., None, None] * feature
        return features

    def _hint(self, control: Control, image: Image.Image) -> Sequence[HostOrDeviceArray]:
        net = control.net
        config, types = self.nets.adapters.get(net), self.nets.control_types.get(net, 0)
        if types:
            given = {
                "picture": hint_pixels(image, hole=UNION_HOLE),
                "control_types": control_types(control, types),
            }
            made = self._left(net, "control_hint", given)
            return made["hint"], made["type_embedding"]
        if config is None:
            return (self._left(net, "control_hint", {"picture": hint_pixels(image)})["hint"],)
        squares = picture_squares(image, config.in_channels, config.downscale_factor)
        made = self._left(net, "t2i_adapter", {"squares": squares})
        return [made[name] for name in feature_names(len(config.channels))]

    def _left(self, net: str, part: ControlPart, inputs: Mapping[str, Array]) -> Mapping[str, Any]:
        """Run a part of a net; what it makes stays on a device whose arrays have rows."""
        engine = self.nets.engine(net, part)
        if isinstance(engine, DeviceEngine) and engine.device.has_addresses:
            return enqueue_from_host(engine, inputs)
        return engine.run(inputs)

    def _residuals(
        self, given: Mapping[str, Any], controls: Sequence[Sequence[CallControl]]
    ) -> dict[str, Array]:
        """Let every ControlNet add its own for the rows that it steers, in each row's order."""
        residuals = _zeros(self.residual_shapes(given))
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
                    **_of_pictures(chosen),
                    "weights": np.concatenate([control.weights for control in chosen], axis=2),
                }
                before = {n: _taken(array, rows, axis=1) for n, array in residuals.items()}
                for name, array in self._with_own(net, inputs, before).items():
                    residuals[name][:, rows] = array
        return residuals

    def _with_own(
        self, net: str, inputs: Mapping[str, Any], before: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the residuals before a ControlNet with its own added; inputs: all but those."""
        pooled = net in self.nets.pooled
        given = {n: np.zeros_like(array) for n, array in before.items()} if pooled else before
        outputs = self._run(net, "control", {**inputs, **given})
        made = {name: outputs[f"next_{name}"] for name in before}
        if pooled:
            means = {name: array.mean(axis=(3, 4), keepdims=True) for name, array in made.items()}
            made = {name: before[name] + means[name] for name in before}
        return made

    def residual_shapes(self, given: Mapping[str, Any]) -> dict[str, Shape]:
        """Return the shapes of what ControlNets add to a call with these inputs."""
        groups, batch = given["context"].shape[:2]
        levels = zip(self.unet.residual_widths(), self._sides(given), strict=True)
        return {
            name: (groups, batch, sum(channels), *sides)
            for name, (channels, sides) in zip(residual_names(self.unet), levels, strict=True)
        }

    def feature_shapes(self, given: Mapping[str, Any]) -> dict[str, Shape]:
        """Return the shapes of what T2I-Adapters add to a call with these inputs."""
        places = adapted_places(self.unet.tensor_shapes())
        (groups, batch), sides = given["context"].shape[:2], self._sides(given)
        return {
            name: (groups, batch, place.width, *sides[place.level])
            for name, place in zip(feature_names(len(places)), places, strict=True)
        }

    def _sides(self, given: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return the sides of the UNet's levels at a call."""
        height, width = given["registers"].shape[3:]
        levels = range(len(self.unet.block_out_channels))
        return [(-(-height // 2**level), -(-width // 2**level)) for level in levels]

    def _run(self, net: str, part: ControlPart, inputs: Mapping[str, Any]) -> dict[str, Any]:
        engine: Engine = self.nets.engine(net, part)
        return engine.run(inputs)


Residuals = Callable[
    [StepInputs, Mapping[str, Any], Sequence[Sequence[CallControl]]], dict[str, Array]
]
"""As `ControlledSteps.added`."""


def _zeros(shapes: Mapping[str, Shape]) -> dict[str, Array]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _over(plan: Plan, image: Image.Image) -> Image.Image:
    """Return a control's picture as it lies over what is drawn, of the run's sides."""
    if plan.frame is not None:
        image = plan.frame.drawn(image)
    size = plan.width, plan.height
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _of_pictures(controls: Sequence[CallControl]) -> dict[str, Array]:
    """Return what a ControlNet made of its rows' pictures, as a call takes it."""
    made = zip(*(map(on_host, control.hint) for control in controls), strict=True)
    return {name: np.concatenate(arrays) for name, arrays in zip(HINTS, made, strict=False)}


def hint_pixels(image: Image.Image, hole: float = HOLE) -> Array:
    """Return a picture as a ControlNet sees it, (1, 3, H, W) from 0 to 1.

    hole: where it is transparent
    """
    rgb = np.asarray(image.convert("RGB"), np.float32) / 255
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        rgb = np.where(alpha[..., None] < OPAQUE, np.float32(hole), rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])


def picture_squares(image: Image.Image, channels: int, side: int) -> Array:
    """Return a picture as a T2I-Adapter sees it, from 0 to 1, its squares of pixels as channels.

    channels: 3, or 1 for gray; side: of the squares; what is no whole one repeats the last pixels
    Returns (1, channels * side**2, H / side, W / side).
    """
    pixels = np.asarray(image.convert("RGB" if channels > 1 else "L"), np.float32) / 255
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    more = [(0, -size % side) for size in pixels.shape[:2]]
    pixels = np.pad(pixels, (*more, (0, 0)), mode="edge")
    rows, columns = (size // side for size in pixels.shape[:2])
    squares = pixels.reshape(rows, side, columns, side, channels).transpose(4, 1, 3, 0, 2)
    return np.ascontiguousarray(squares.reshape(1, -1, rows, columns))


def _taken(array: NDArray[Any], rows: Sequence[int], *, axis: int) -> NDArray[Any]:
    if list(rows) == list(range(array.shape[axis])):
        return array
    return np.ascontiguousarray(np.take(array, rows, axis=axis))
