"""From the rounds of a race to medians, spreads and shares of what the machine can do."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders import CONTENDERS, PEAK, PEAK_SIDE
from benchmarks.machine import summary
from benchmarks.scenarios import PARTS, WHOLE

# What of the peak's rounds a precision is measured against: the best of these.
PEAKS = {"float32": ("float32", "float32 of torch"), "bfloat16": ("bfloat16",), "int8": ("int8",)}
Rounds = Sequence[Mapping[str, float]]


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with medians and shares of the machine's peak made from its rounds."""
    steps, flops = report["request"]["steps"], report["flops"]
    peaks = _peaks(report["contenders"].get(PEAK, {"rounds": []})["rounds"])
    shown = {}
    for name, taken in report["contenders"].items():
        shown[name] = dict(taken)
        if name == PEAK or not taken["rounds"]:
            continue
        contender = CONTENDERS[name]
        rounds = taken["rounds"]
        parts = {part: summary([seconds[part] for seconds in rounds]) for part in rounds[0]}
        if WHOLE not in parts:
            keys = parts["step"].keys()
            sums = {key: total({p: parts[p][key] for p in PARTS}, steps) for key in keys}
            parts[WHOLE] = {key: round(value, 5) for key, value in sums.items()}
        counted = not (contender.saves or contender.draws)
        peak = peaks.get(contender.precision) if counted else None
        shown[name] |= {
            "precision": contender.precision,
            "settings": contender.settings,
            "parts": parts,
            "peak_share": {
                part: round(flops[part] / parts[part]["median"] / peak, 4) if peak else None
                for part in parts
            },
        }
    rates = {precision: round(rate / 1e9, 1) for precision, rate in peaks.items()}
    return {**report, "peak_gflops": rates, "contenders": shown}


def _peaks(rounds: Rounds) -> dict[str, float]:
    """Return the best rate of the rounds by precision, operations a second."""
    flops = 2 * PEAK_SIDE**3
    return {
        precision: max(
            flops / seconds[name] for seconds in rounds for name in names if name in seconds
        )
        for precision, names in PEAKS.items()
        if any(name in seconds for seconds in rounds for name in names)
    }


def total(parts: Mapping[str, Any], steps: int) -> Any:
    """Add up a request of that many steps."""
    return parts["text"] + steps * parts["step"] + parts["decode"]


def ratios(report: Mapping[str, Any], name: str, other: str, whole: str = WHOLE) -> list[float]:
    """Return a contender's time of a request beside another's, round by round."""
    steps, contenders = report["request"]["steps"], report["contenders"]
    rounds = zip(contenders[name]["rounds"], contenders[other]["rounds"], strict=False)
    return [
        _request(mine, whole, steps) / _request(theirs, whole, steps) for mine, theirs in rounds
    ]


def _request(seconds: Mapping[str, float], whole: str, steps: int) -> float:
    return float(seconds[whole] if whole in seconds else total(seconds, steps))
