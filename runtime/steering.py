"""What steers a model beside its texts: ControlNets, T2I-Adapters and IP-Adapters."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.backends.memory_estimate import Needed
from engine.engines import Engines
from engine.errors import ModelError
from engine.steering.control_nets import ControlNets
from engine.steering.ip_adapters import IPAdapters
from runtime.denoising.controls import ControlledSteps, call_controls
from runtime.denoising.image_prompts import AttendedImages
from runtime.denoising.latents import State
from runtime.plan import Array, Plan, StepInputs
from runtime.request import Request

__all__ = ["Steering"]

_NONE = "none of {} steps, for none lies whole in that part of the run; make it wider"


class Steering:
    """What the engines of a model are steered by, and the pictures that it was shown.

    control_nets, ip_adapters: those that requests may name
    controlled: the calls that ControlNets and T2I-Adapters add to
    """

    def __init__(self, engines: Engines) -> None:
        self.control_nets = ControlNets(engines)
        self.ip_adapters = IPAdapters(engines)
        self.controlled = ControlledSteps(unet=engines.model.unet, nets=self.control_nets)
        self._attended_images = AttendedImages(adapters=self.ip_adapters)

    def set_ip_adapters(
        self,
        files: Mapping[str, Path],
        image_encoders: Mapping[str, Path | None] | Path | None,
    ) -> None:
        """Take IP-Adapters by their names, and the encoders of all or each, in place of others.

        Raises ModelError for what is none, is of another family or encoder, and for an encoder of
        no adapter; BackendError for a backend whose engines are built beforehand.
        """
        if isinstance(image_encoders, Mapping):
            if unknown := image_encoders.keys() - files.keys():
                raise ModelError(
                    f"an image encoder is for {', '.join(map(repr, unknown))}, which is no "
                    f"IP-Adapter of {', '.join(map(repr, files)) or 'none'}; name one of them"
                )
        else:
            image_encoders = dict.fromkeys(files, image_encoders)
        self.ip_adapters.set(files, image_encoders)
        self._attended_images.forget()

    def completed(self, request: Request) -> Request:
        """Return a request whose controls say how their hints are made, where their files do.

        Raises RequestError for ControlNets or IP-Adapters that there are not.
        """
        self._attended_images.check(request.image_prompts)
        controls = self.controlled.completed(request.controls)
        return replace(request, controls=controls) if request.controls else request

    def steered(self, plan: Plan, request: Request) -> Plan:
        """Return a plan that says how its controls steer every call; it notes what steers none."""
        if request.controls:
            plan = self.controlled.steered(plan)
        calls, notes = len(plan.program.timesteps), list[str]()
        for control in request.controls:
            if any(control.weights) and not control.over(calls).any():
                notes.append(f"the control {control.text} steers {_NONE.format(calls)}")
        for prompt in request.image_prompts:
            if any(prompt.scales) and not prompt.over(calls).any():
                notes.append(f"the image prompt {prompt.text} is seen at {_NONE.format(calls)}")
        return replace(plan, notes=[*plan.notes, *notes]) if notes else plan

    def needed(self, plan: Plan) -> dict[str, Needed]:
        """Return what a plan's nets and adapters take of a device's memory; raises GraphError."""
        nets = self.control_nets.needed(control.net for control in plan.controls)
        return {**nets, **self._attended_images.needed(plan)}

    def open(self, plan: Plan) -> None:
        """Open the engines of a plan's pictures; raises GraphError or BackendError."""
        self.controlled.open(plan)
        self._attended_images.open(plan)

    def begun(self, state: State, plan: Plan) -> State:
        """Return a run's first state with what is made of its pictures."""
        if plan.controls:
            state = replace(state, hints=self.controlled.hints(plan))
        if plan.image_prompts:
            images = self._attended_images.constants(plan)
            state = replace(state, constant={**state.constant, **images})
        return state

    def added(self, step: StepInputs, state: State, given: Mapping[str, Any]) -> dict[str, Array]:
        """Return what is added to the UNet's maps at a call: (g, B, C, h, w), by name.

        state: before the call; given: the call's inputs. Raises BackendError.
        """
        rows = [call_controls(step, state.hints)] * len(given["noise"])
        return self.controlled.added(step, given, rows)

    def close(self) -> None:
        """Let go of the engines, and of what they made of pictures."""
        self.control_nets.close()
        self.ip_adapters.close()
        self._attended_images.forget()
