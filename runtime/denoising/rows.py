"""Rows: pictures that share calls of the UNet, each at a step of its own.

Every input of a step has a row for each picture, so pictures of other samplers, step counts, scales
and strengths can be laid into one call, as long as what the graph shares is of one shape: sides,
tokens, groups of guidance, whole or shallow. That is a row's bucket. It may change between two
steps: guidance ends, the words of a prompt change, deep features are taken again.

With ONNX Runtime on a processor, in float32, a row is bit for bit what it is alone, whatever is
beside it, as long as it has two groups of guidance or more. One group of one picture is a product
of a matrix and a vector there, which is summed in another order than that of two matrices: such a
row differs in the last bits beside others, and `Row.is_sensitive` says so.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import FindEngine
from engine.devices.device import HostOrDeviceArray
from engine.graphs.graph import Part
from engine.graphs.steering import IP_BY_GROUPS, MAX_FEATURES, MAX_LEVELS, feature_names
from engine.graphs.variants import Variant
from runtime.denoising.latents import State, predicted_x0
from runtime.plan import Array, Plan, StepInputs
from runtime.samplers.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from runtime.denoising.controls import CallControl, Residuals

__all__ = ["Row", "padded", "part_of", "rows_of", "step_rows"]

# Inputs and outputs that have groups of conditioning first and pictures second; others begin with
# pictures.
BY_GROUPS = frozenset(
    (
        *(f"residuals_{level}" for level in range(MAX_LEVELS)),
        *feature_names(MAX_FEATURES),
        *IP_BY_GROUPS,
        "context",
        "guidance",
        "perturbed",
        "shown",
        "edited_image",
        "update",
        "text_embeds",
        "time_ids",
        "deep",
    )
)
BY_REGISTERS = frozenset(("registers", "matrices", "outside"))  # padded to the most of a call
DIRECTED = {"recalled": 0, "directions": 1}  # too, and the rows that each has beyond the registers

Start = Callable[[Plan, HostOrDeviceArray | None], State]
"""As `Pipeline.start`: a plan and the latents of the run before to the state before its first call.
"""


class Row:
    """One picture on its way: the run that it is in, and where in it.

    It begins before its first run; `enter` begins one, `step_rows` makes calls of it. What it was
    given at a call is kept until the call has succeeded, so a call that failed can be made again
    among other rows, with the same noise.

    plan: of this picture alone, as `rows_of` makes it
    calls: how many were made, all runs together; total: how many there are
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.calls = 0
        self.total = plan.calls
        self._runs = list(plan.runs())
        self._steps: list[StepInputs] = []
        self._state: State | None = None
        self._at = 0
        self._made_by: StepInputs | None = None
        self._given: dict[str, Any] | None = None

    @property
    def run_is_over(self) -> bool:
        """Whether no call is left in this run: another must be entered, or the picture is done."""
        return self._at == len(self._steps)

    @property
    def is_done(self) -> bool:
        """Whether no call is left at all."""
        return self.run_is_over and not self._runs

    def enter(self, start: Start) -> None:
        """Begin the next run, from noise, an image, or the latents of the run before.

        It encodes images and decodes a first run's latents, so it takes longer than a step.
        Raises what `start` does, and can then be tried again.
        """
        assert self.run_is_over
        run = self._runs[0]
        self._state = start(run, None if self._state is None else self._state.latents)
        self._steps, self._at = run.steps(), 0
        del self._runs[0]

    @property
    def latents(self) -> Array:
        """(1, C, h, w) float32, at the noise level of the next call."""
        assert self._state is not None
        return self._state.latents

    @property
    def bucket(self) -> Hashable:
        """What is equal in all rows of a call: the part, and shapes less pictures and registers."""
        assert self._state is not None
        step = self._steps[self._at]
        shared = {**step.conditioning, **self._state.constant}
        shapes = sorted((name, _shape_of_one(name, array)) for name, array in shared.items())
        return step.part, step.variant, self._state.registers.shape[2:], tuple(shapes)

    @property
    def is_sensitive(self) -> bool:
        """Whether the next call gives other last bits beside other rows than alone."""
        return len(self._steps[self._at].conditioning["guidance"]) == 1

    @property
    def keeps_deep(self) -> bool:
        """Whether a later call of this run takes the deep features of a call before."""
        assert self._state is not None
        return self._state.keeps_deep

    @property
    def part(self) -> Part:
        """The part whose engine the next call runs."""
        return self._steps[self._at].part

    @property
    def variant(self) -> Variant | None:
        """What that part computes beside what it always does."""
        return self._steps[self._at].variant

    @property
    def controls(self) -> "list[CallControl]":
        """What steers the next call."""
        from runtime.denoising.controls import call_controls

        assert self._state is not None
        return call_controls(self._steps[self._at], self._state.hints)

    @property
    def next_step(self) -> StepInputs:
        """What the next call is given beside the latents."""
        return self._steps[self._at]

    def inputs(self) -> dict[str, Any]:
        """Return all inputs of the next call, each for one picture; its noise is drawn once."""
        assert self._state is not None
        if self._given is None:
            self._given = self._state.inputs(self._steps[self._at])
        return self._given

    def advance(self, outputs: Mapping[str, HostOrDeviceArray]) -> None:
        """Go on to the next call; outputs: of the step's engine, for this picture."""
        assert self._state is not None
        self._made_by = self._steps[self._at]
        self._state = self._state.after(outputs, self.inputs())
        self._given = None
        self._at += 1
        self.calls += 1

    def denoised(self, schedule: NoiseSchedule) -> Callable[[], Array]:
        """Return what computes the x0 that the model predicted at the last call, (1, C, h, w).

        It holds that call and stays what it is while the row goes on, so another thread may draw
        a preview from it.
        """
        assert self._state is not None
        assert self._made_by is not None
        return partial(predicted_x0, schedule, self._made_by, self._state)


def rows_of(plan: Plan) -> list[Row]:
    """Return a plan's pictures as rows; each gives what it gives in the plan."""
    return [Row(part_of(plan, [index])) for index in range(len(plan.seeds))]


def step_rows(
    rows: Sequence[Row],
    engine: FindEngine,
    *,
    filled_to: int = 0,
    residuals: "Residuals | None" = None,
) -> None:
    """Make the next call of rows of one bucket together.

    engine: returns a part's engine; filled_to: rows that the call has at least, by repeats
    residuals: computes what is added to the UNet of rows that are steered
    Raises BackendError, and then every row is where it was.
    """
    inputs = [row.inputs() for row in rows]
    filled = [*range(len(rows)), *[len(rows) - 1] * (filled_to - len(rows))]
    laid, added = _laid_out([inputs[index] for index in filled]), dict[str, Array]()
    if residuals is not None and rows[0].next_step.is_steered:
        added = residuals(rows[0].next_step, laid, [rows[index].controls for index in filled])
        laid |= added
    outputs = engine(rows[0].part, rows[0].variant).run(laid)
    for index, row in enumerate(rows):
        inputs[index] |= {name: _take(name, array, index) for name, array in added.items()}
        registers = row.inputs()["registers"].shape[1]
        given = {name: _take(name, array, index) for name, array in outputs.items()}
        row.advance({**given, "next_registers": given["next_registers"][:, :registers]})


def _laid_out(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay the inputs of several pictures beside each other; those of one stay as they are."""
    if len(given) == 1:
        return dict(given[0])
    most = max(inputs["registers"].shape[1] for inputs in given)
    return {
        name: np.concatenate(
            [padded(name, inputs[name], most) for inputs in given], axis=int(name in BY_GROUPS)
        )
        for name in given[0]
    }


def padded(name: str, array: NDArray[Any], registers: int) -> NDArray[Any]:
    """Pad what has a register's axis with zeros; out and noise stay the last two columns.

    array: an input of pictures: registers (B, r, C, h, w), matrices (B, r, r + 2), outside
        (B, r + 2), or any other, which stays; registers: the r of what is returned
    """
    if name in DIRECTED:
        more = registers + DIRECTED[name] - array.shape[1]
        return np.pad(array, ((0, 0), (0, more), *[(0, 0)] * (array.ndim - 2))) if more else array
    if name not in BY_REGISTERS or array.shape[1] == registers + 2 * (name == "outside"):
        return array
    own = array.shape[1] - 2 * (name == "outside")
    if name == "registers":
        padded = np.zeros((len(array), registers, *array.shape[2:]), array.dtype)
        padded[:, :own] = array
        return padded
    columns = np.r_[0:own, registers : registers + 2]
    if name == "outside":
        padded = np.zeros((len(array), registers + 2), array.dtype)
        padded[:, columns] = array
        return padded
    padded = np.zeros((len(array), registers, registers + 2), array.dtype)
    padded[:, :own, columns] = array
    return padded


def _take(name: str, array: NDArray[Any], index: int) -> NDArray[Any]:
    """Return one picture's part of an array, still with the axis of pictures."""
    if name in BY_GROUPS:
        return np.ascontiguousarray(array[:, index : index + 1])
    return array[index : index + 1]


def _shape_of_one(name: str, array: NDArray[Any]) -> tuple[int, ...]:
    axis = int(name in BY_GROUPS)
    return array.shape[:axis] + array.shape[axis + 1 :]


def part_of(plan: Plan, pictures: Sequence[int]) -> Plan:
    """Return the plan of some of a plan's pictures; an index beyond the last one repeats it.

    Repeats fill a batch, and are dropped when it is finished. What is one array in several calls
    stays one.
    """
    count = len(plan.seeds)
    chosen = [min(index, count - 1) for index in pictures]
    if chosen == list(range(count)):
        return plan
    taken: dict[int, Array] = {}

    def take(name: str, array: Array) -> Array:
        if id(array) not in taken:
            axis = int(name in BY_GROUPS)
            taken[id(array)] = np.ascontiguousarray(np.take(array, chosen, axis=axis))
        return taken[id(array)]

    return replace(
        plan,
        conditioning=[
            {name: take(name, array) for name, array in call.items()} for call in plan.conditioning
        ],
        seeds=[plan.seeds[index] for index in chosen],
        variation_seeds=[plan.variation_seeds[index] for index in chosen]
        if plan.variation_seeds
        else (),
        settings=[plan.settings[index] for index in pictures if index < count]
        if plan.settings
        else (),
        latents=None if plan.latents is None else plan.latents[chosen],
        surplus=sum(index >= count for index in pictures),
        hires=None if plan.hires is None else part_of(plan.hires, pictures),
    )
