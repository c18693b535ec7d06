"""Do two runs of the latency benchmark say the same of who is faster, and by how much?

A contender's ratio is its time of a request beside the reference's in the same round. Two runs
agree on it when the ranges of their ratios meet, each widened by what counts as a tie.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.contenders import PEAK, REFERENCE
from benchmarks.rounds import ratios
from engine.errors import RequestError

TIE = 0.05  # differences below this share are noise on machines that others use too


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two reports of `latency`; `exceeded` names the contenders that they differ on.

    Raises RequestError when they measured different requests, or the reference is not in both.
    """
    for report in (first, second):
        if not report.get("contenders", {}).get(REFERENCE, {}).get("rounds"):
            raise RequestError(f"a report has no rounds of {REFERENCE!r}; measure it too")
    if first["request"] != second["request"]:
        raise RequestError("the two reports are of different requests; give two runs of one")
    found = {}
    for name in first["contenders"].keys() & second["contenders"].keys() - {PEAK, REFERENCE}:
        pair = [ratios(report, name, REFERENCE) for report in (first, second)]
        if all(pair):
            found[name] = [{"min": round(min(r), 4), "max": round(max(r), 4)} for r in pair]
    return {
        "request": first["request"],
        "ratios": dict(sorted(found.items())),
        "exceeded": [name for name, (a, b) in sorted(found.items()) if not _meet(a, b)],
    }


def _meet(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a["min"] <= b["max"] * (1 + TIE) and b["min"] <= a["max"] * (1 + TIE)
