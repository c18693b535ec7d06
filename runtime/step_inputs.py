"""What one call of the UNet is given, beside the latents and what is the same at every call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.graphs.graph import Part
from engine.graphs.variants import Variant
from runtime.control import StepControl

__all__ = ["STEP_PARTS", "StepInputs", "StepPart", "rows_of_calls"]

Array = NDArray[np.float32]
StepPart = Literal[
    "step",
    "step_shallow",
    "step_controlled",
    "step_shallow_controlled",
    "step_ip",
    "step_shallow_ip",
    "step_controlled_ip",
    "step_shallow_controlled_ip",
    "step_shrunk",
]
# The parts that make calls of the UNet, whole and shallow, by whether a run is controlled and has
# image prompts.
STEP_PARTS: Mapping[tuple[bool, bool], tuple[StepPart, StepPart]] = {
    (False, False): ("step", "step_shallow"),
    (True, False): ("step_controlled", "step_shallow_controlled"),
    (False, True): ("step_ip", "step_shallow_ip"),
    (True, True): ("step_controlled_ip", "step_shallow_controlled_ip"),
}


@dataclass(slots=True, kw_only=True, eq=False)  # frozen, one a call would take twice as long
class StepInputs:
    """What one call of the UNet is given beside the latents, for B pictures.

    Every row is a picture's own, so pictures of other samplers and at other steps may share a call.

    conditioning: the texts and how much they count, context (g, B, n, D), guidance
        (g, B, 1, h or 1, w or 1) and, by the model, others, as `Encoder.condition` returns them
    per_step: matrices (B, r, r + 2), outside (B, r + 2), timestep (B,), input_scale (B,), float32
    is_full: whether the UNet runs whole, or around the deep features of a call before
    signal_scale, noise_scale: alpha and sigma of the latents that go in
    controls: what steers this call; is_controlled: whether a ControlNet steers any call of the run,
        so that all have one graph; has_images: whether the run has image prompts, likewise
    is_shrunk: whether the UNet's lower levels see half the sides, where it runs whole
    variants: what parts compute beside what they always do
    """

    conditioning: Mapping[str, Array]
    per_step: Mapping[str, Array]
    is_full: bool
    signal_scale: float
    noise_scale: float
    controls: Sequence[StepControl] = ()
    is_controlled: bool = False
    has_images: bool = False
    is_shrunk: bool = False
    variants: Mapping[Part, Variant] = field(default_factory=dict)

    @property
    def part(self) -> StepPart:
        """The part whose engine is called."""
        whole, shallow = STEP_PARTS[self.is_controlled, self.has_images]
        if self.is_shrunk:
            whole = "step_shrunk"
        return whole if self.is_full else shallow

    @property
    def is_adapted(self) -> bool:
        """Whether the call takes features of T2I-Adapters."""
        return self.variant is not None and self.variant.adapted

    @property
    def is_steered(self) -> bool:
        """Whether residuals or features are to be computed: a shallow call has those before."""
        return self.is_full and (self.is_controlled or self.is_adapted)

    def told(self, constant: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs that earlier calls have no part in, but for the call's own rows.

        constant: arrays that a run gives all of its calls, by the inputs' names
        They are as in `conditioning`: (g, B, ...) float32.
        """
        given = {**self.conditioning, **constant}
        if "shown" in given:
            shown = given.pop("shown")[..., None, None, None]
            given["edited_image"] = shown * given.pop("image_latents")
        if not self.is_full:
            given.pop("perturbed", None)  # the middle is not run
        return given

    @property
    def variant(self) -> Variant | None:
        """What that part computes beside what it always does."""
        return self.variants.get(self.part)


def rows_of_calls(tables: Mapping[str, NDArray[np.float64]], batch: int) -> list[dict[str, Array]]:
    """Return what every call is given of a run's tables, (N, ...) each: (B, ...) float32 by name.

    All B pictures are given the same.
    """
    repeated = {
        name: np.repeat(np.asarray(table, np.float32)[:, None], batch, axis=1)
        for name, table in tables.items()
    }
    calls = len(next(iter(repeated.values())))
    return [{name: table[call] for name, table in repeated.items()} for call in range(calls)]
