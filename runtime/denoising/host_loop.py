"""The calls of the UNet in one run: what each is told, and the loop over them on a processor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Engine
from engine.graphs.signature import Part
from runtime.noise import Noise, draw

Array = NDArray[np.float32]

AHEAD_BYTES = 2**24  # of noise that is drawn before it is needed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """All that is known of a run before its first call; N calls for B pictures.

    registers: (B, r, C, h, w), what the first call starts from
    told: of each call, the conditioning as `runtime.conditioning.encoder` gives it
    constant: inputs that stay
    tables: inputs that change from call to call, (N, B, ...)
    noises: each picture's generator; needs_noise: (N,), whether a call draws from them
    whole: (N,), whether the UNet runs whole, or around the deep features of a call before
    """

    registers: Array
    told: Sequence[Mapping[str, Array]]
    constant: Mapping[str, Array]
    tables: Mapping[str, Array]
    noises: Sequence[Noise]
    needs_noise: NDArray[np.bool_]
    whole: Sequence[bool]

    def inputs(self, call: int) -> dict[str, NDArray[Any]]:
        """Return what a call is told but for the registers, the noise and deep features."""
        tables = {name: table[call] for name, table in self.tables.items()}
        return {**self.told[call], **self.constant, **tables}

    def fresh(self) -> Iterator[Array]:
        """Yield the noise of each call, (B, C, h, w), drawn some calls ahead.

        A draw between two calls takes ten times as long as draws in a row: the engine has emptied
        the processor's caches.
        """
        shape = self.registers.shape[2:]
        silence = np.zeros((len(self.noises), *shape), np.float32)
        ahead = max(1, AHEAD_BYTES // silence.nbytes)
        waiting: list[Array] = []
        for call, draws in enumerate(self.needs_noise):
            if draws and not waiting:
                left = int(self.needs_noise[call:].sum())
                waiting = [draw(self.noises, shape) for _ in range(min(ahead, left))]
            yield waiting.pop(0) if draws else silence


def run_calls(
    calls: Calls, engine: Callable[[Part], Engine]
) -> Iterator[tuple[dict[str, NDArray[Any]], Array]]:
    """Call the UNet; yields what a call was told and the registers (B, r, C, h, w) that it made."""
    registers, deep = calls.registers, None
    keeps = not all(calls.whole)
    for call, noise in enumerate(calls.fresh()):
        inputs = {**calls.inputs(call), "registers": registers, "noise": noise}
        if calls.whole[call]:
            outputs = engine("step").run(inputs)
            deep = outputs["deep"] if keeps else None
        else:
            assert deep is not None
            outputs = engine("step_shallow").run({**inputs, "deep": deep})
        registers = outputs["next_registers"]
        yield inputs, registers
