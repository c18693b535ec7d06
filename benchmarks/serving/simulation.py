"""What a batch gains on other machines: the engine's own loop on a clock that a cost curve moves.

The unit is a step of one picture alone. Curves that are not measured are stated: what a call of b
rows takes is a + c * b, and a/c says how much there is to gain.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.serving.contenders import ALONE, CONTENDERS, ROWS
from benchmarks.serving.driving import Seen, by_hand, make_loop
from benchmarks.serving.traffic import MIXES, at_once, orders, poisson
from serving.enlarging_request import EnlargingRequest
from serving.picture_request import PictureRequest
from serving.unfinished_picture import FinishedPicture

RUNS = 3  # of other requests at other times; quantiles are their mean
# Of the decoder, in steps, where it is not measured: by their operations a decoder of Stable
# Diffusion 1.5 takes 0.9 guided steps of its UNet.
DECODE = 1.0


@dataclass(frozen=True, slots=True)
class Curve:
    """What a call of b rows takes, in any unit: straight lines between the rows that are known.

    decode: of a picture, in steps of one alone
    """

    times: Mapping[int, float]
    decode: float = DECODE

    def __call__(self, rows: int) -> float:
        """Return the time of a call in times of one row's; beyond the last, the line goes on."""
        known = sorted(self.times)
        last, before = known[-1], known[-2]
        if rows > last:
            slope = (self.times[last] - self.times[before]) / (last - before)
            taken = self.times[last] + slope * (rows - last)
        else:
            taken = float(np.interp(rows, known, [self.times[b] for b in known]))
        return taken / self.times[known[0]]


def line(constant: float) -> Curve:
    """Return the curve whose a/c is this."""
    return Curve({1: constant + 1, 2: constant + 2})


# V100: seconds of a request of Stable Diffusion 1.5 at 1, 4 and 8 pictures, ONNX Runtime 1.14's
# table in its stable_diffusion/README; the other two are assumed.
V100 = "V100, SD 1.5 (published)"
CURVES: Mapping[str, Curve] = {
    V100: Curve({1: 2.7, 4: 8.3, 8: 15.7}),
    "a/c = 1 (assumed)": line(1.0),
    "a/c = 3 (assumed)": line(3.0),
}


class VirtualClock:
    """A time that only the work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """As `Clock` says."""
        return self.now

    def skip_to(self, seconds: float) -> None:
        """As `Clock` says."""
        self.now = max(self.now, seconds)


@dataclass(slots=True, eq=False)
class SimulatedPicture:
    """A picture that counts its steps; its file is its prompt."""

    runner: "SimulatedRunner"
    prompt: str
    total: int
    calls: int = 0
    is_begun: bool = False
    bucket: str = "one"
    form: str = "one"

    def fitting_rows(self) -> int:
        """As `UnfinishedPicture` says."""
        return 10**6

    @property
    def run_is_over(self) -> bool:
        """As `UnfinishedPicture` says."""
        return self.calls == self.total or not self.is_begun

    @property
    def is_done(self) -> bool:
        """As `UnfinishedPicture` says."""
        return self.calls == self.total

    def enter(self) -> None:
        """As `UnfinishedPicture` says."""
        self.is_begun = True

    def preview(self) -> Callable[[], bytes]:
        """As `UnfinishedPicture` says."""
        return lambda: b""

    def finish(self) -> FinishedPicture:
        """As `UnfinishedPicture` says."""
        self.runner.work(self.runner.decode)
        return FinishedPicture(data=self.prompt.encode(), settings={})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRunner:
    """Draws nothing, and takes the time that a curve says.

    work: is called with what work took; decode: of a picture
    """

    curve: Callable[[int], float]
    work: Callable[[float], None]
    decode: float = 0.0

    def warm(self, model: str) -> None:
        """Load nothing."""

    def unfinished_pictures(
        self, picture_request: PictureRequest | EnlargingRequest
    ) -> list[SimulatedPicture]:
        """As `ModelRunner` says."""
        fields = picture_request.fields
        steps = fields.get("num_inference_steps") or 20
        made = range(picture_request.count)
        return [SimulatedPicture(self, str(fields["prompt"]), steps) for _ in made]

    def step(self, unfinished_pictures: Sequence[SimulatedPicture]) -> None:
        """As `ModelRunner` says."""
        self.work(self.curve(len(unfinished_pictures)))
        for picture in unfinished_pictures:
            picture.calls += 1


def simulate(
    contender: str, curve: Curve, mix: str, arrivals: Sequence[float], rows: int, seed: int
) -> Seen:
    """Draw requests on a clock of their own."""
    clock = VirtualClock()

    def work(seconds: float) -> None:
        clock.now += seconds

    runner = SimulatedRunner(curve=curve, work=work, decode=curve.decode)
    seen = Seen(clock=clock, arrivals=arrivals)
    loop = make_loop(contender, runner, seen, rows, clock)
    by_hand(loop, seen, clock, orders(mix, len(arrivals), seed))
    return seen


def measure(
    measured: Mapping[int, float], decode: float, rows: int, loads: Sequence[float], count: int
) -> dict[str, Any]:
    """Simulate every contender on every curve.

    measured: seconds of this machine's steps by their rows; decode: of its decoder, in steps
    loads: of the capacity of one at a time; count: requests of a run
    """
    curves = {"this machine (measured)": Curve(measured, decode), **CURVES}
    return {
        "request": {"rows": rows, "requests": count, "runs": RUNS},
        "curves": {name: _on_curve(curve, rows, loads, count) for name, curve in curves.items()},
    }


def _on_curve(curve: Curve, rows: int, loads: Sequence[float], count: int) -> dict[str, Any]:
    capacity = {
        mix: {contender: _capacity(contender, curve, mix, rows, count) for contender in CONTENDERS}
        for mix in MIXES
    }
    capacity["mixed"][f"{ROWS}, 16 at most"] = _capacity(ROWS, curve, "mixed", 16, count)
    alone = capacity["mixed"][ALONE]
    gains = {
        mix: {name: rate / capacity[mix][ALONE] for name, rate in rates.items()}
        for mix, rates in capacity.items()
    }
    waits = {
        str(load): {
            contender: _averaged(contender, curve, load * alone, rows, count)
            for contender in CONTENDERS
        }
        for load in loads
    }
    rows_known = (1, 2, 4, 8, 16)
    return {
        "steps": {str(b): curve(b) for b in rows_known},
        "decode_steps": curve.decode,
        "capacity": gains,
        "loads": waits,
    }


def _capacity(contender: str, curve: Curve, mix: str, rows: int, count: int) -> float:
    seen = simulate(contender, curve, mix, at_once(count), rows, seed=1)
    return count / max(seen.ends.values())


def _averaged(contender: str, curve: Curve, rate: float, rows: int, count: int) -> dict[str, Any]:
    runs = [
        simulate(contender, curve, "mixed", poisson(count, rate, seed), rows, seed).figures()
        for seed in range(RUNS)
    ]
    return {
        what: {q: float(np.mean([run[what][q] for run in runs])) for q in ("p50", "p95")}
        for what in ("whole_s", "first_step_s")
    }
