"""From the rounds on a GPU to medians, to factors beside others and to a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison_tables import GIB, shown_seconds, shown_spread
from benchmarks.gpu_contenders import (
    CEILINGS,
    COMPILED,
    COPY,
    COPY_BYTES,
    GPU_CONTENDERS,
    PRODUCT,
    PRODUCT_SIDE,
    UPLOAD,
    UPLOAD_BYTES,
)
from benchmarks.machine import summary
from benchmarks.scenarios import LONGER, LONGER_STEPS, QUEUED, STEPS, WHOLE

# What each does in one run: operations, or bytes that are read and written.
WORK = {PRODUCT: 2 * PRODUCT_SIDE**3, COPY: 2 * COPY_BYTES, UPLOAD: UPLOAD_BYTES}
HEADS = (
    "whole request",
    "beside torch.compile",
    "beside its engines' own time",
    "beside the floor",
    "memory",
    "error of a step",
    "picture",
)


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with medians and factors made from its rounds."""
    scenarios = {key: _scenario(found) for key, found in report["scenarios"].items()}
    return {**report, "scenarios": scenarios}


def _scenario(found: Mapping[str, Any]) -> dict[str, Any]:
    ceilings = _ceilings(found["contenders"].get(CEILINGS, {"rounds": []})["rounds"])
    contenders = {}
    for name, taken in found["contenders"].items():
        contenders[name] = {key: value for key, value in taken.items() if key != "requests"}
        if name != CEILINGS and taken["rounds"]:
            parts = {
                part: summary([seconds[part] for seconds in taken["rounds"]])
                for part in taken["rounds"][0]
            }
            contenders[name] |= {"settings": GPU_CONTENDERS[name].settings, "parts": parts}
    compiled = contenders.get(COMPILED, {}).get("parts")
    for taken in contenders.values():
        if "parts" in taken:
            taken["requests"] = [
                _request(taken["parts"], part, steps, found, ceilings.get(PRODUCT), compiled)
                for part, steps in ((WHOLE, found["steps"]), (LONGER, LONGER_STEPS))
                if part in taken["parts"]
            ]
    return {**found, "ceilings": ceilings, "contenders": contenders}


def _ceilings(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the best rates of the rounds, operations or bytes a second."""
    return {
        name: float(f"{work / min(seconds[name] for seconds in rounds):.4g}")
        for name, work in WORK.items()
        if rounds and all(name in seconds for seconds in rounds)
    }


def _request(
    parts: Mapping[str, Any],
    whole: str,
    steps: int,
    found: Mapping[str, Any],
    rate: float | None,
    compiled: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Say of a whole request what it takes beside the sum of its parts, the floor and a peer.

    own_s: of the engines alone, the steps queued in a row
    """
    seconds, flops = parts[whole]["median"], found["flops"]
    step = parts[STEPS]["median"] / QUEUED
    own = parts["text"]["median"] + steps * step + parts["decode"]["median"]
    floor = None
    if rate:
        floor = (flops["text"] + steps * flops["step"] + flops["decode"]) / rate
    beside = compiled and seconds / compiled[whole]["median"]
    return {
        "steps": steps,
        "seconds": parts[whole],
        "own_s": round(own, 5),
        "times_own": round(seconds / own, 3),
        "floor_s": floor and float(f"{floor:.4g}"),
        "times_floor": floor and round(seconds / floor, 2),
        "times_compiled": beside and round(beside, 3),
    }


def gpu_table(report: Mapping[str, Any]) -> str:
    """Render every scenario's contenders, its ceilings, and why others were left out."""
    machine, gpu = report["machine"], report["request"]["gpu"]
    lines = [
        f"{gpu['name']} ({gpu['sm']}, driver {gpu['driver']}, "
        f"{gpu['memory_bytes'] / GIB:.0f} GiB) in a machine with {machine['processor']}, "
        f"{machine['cores']} cores. Medians, smallest to largest. A floor is the counted "
        "operations at the rate of a large float16 product in the same run."
    ]
    for found in report["scenarios"].values():
        lines += ["", *_table(found)]
    if unfinished := report.get("unfinished"):
        lines += ["", f"Not finished: {', '.join(unfinished)}."]
    return "\n".join(lines)


def _table(found: Mapping[str, Any]) -> list[str]:
    rates, contenders = found["ceilings"], found["contenders"]
    ceilings = ", ".join(
        f"{name} {rates[name] / 1e12:.3g} {unit}"
        for name, unit in ((PRODUCT, "TFLOP/s"), (COPY, "TB/s"), (UPLOAD, "TB/s"))
        if name in rates
    )
    pictures = "1 picture" if found["batch"] == 1 else f"{found['batch']} pictures"
    lines = [
        f"**{found['title']}, {found['size']} × {found['size']}, {pictures}**, guidance "
        f"{found['guidance_scale']}; {ceilings or 'ceilings not measured'}; compared with "
        f"{found['reference']}.",
        "",
        f"| steps | | {' | '.join(HEADS)} |",
        "|---|---|" + "---|" * len(HEADS),
    ]
    rows = [
        (request["steps"], name, _row(taken, request))
        for name, taken in contenders.items()
        for request in taken.get("requests", ())
    ]
    # By the number of steps; a sort keeps the order of equal ones.
    for steps, name, cells in sorted(rows, key=lambda row: row[0]):
        lines.append(f"| {steps} | {name} | {' | '.join(cells)} |")
    return lines + [
        f"- left out: {name} ({taken['skipped']})"
        for name, taken in contenders.items()
        if "skipped" in taken
    ]


def _row(taken: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    agreement = taken.get("agreement", {})
    error, decibels = agreement.get("step_relative_error"), agreement.get("whole_psnr_db")
    cells = [
        shown_spread(request["seconds"]),
        _times(request["times_compiled"]),
        f"{_times(request['times_own'])} of {shown_seconds(request['own_s'])}",
        _times(request["times_floor"]),
        f"{taken['peak_bytes'] / GIB:.2f} GiB" if "peak_bytes" in taken else "–",
        "–" if error is None else f"{error:.1g}",
        "–" if decibels is None else f"{decibels:.1f} dB",
    ]
    if agreement.get("agrees") is False:
        cells[-1] += ", **computes something else**"
    return cells


def _times(factor: float | None) -> str:
    return "–" if factor is None else f"× {factor:.2f}"
