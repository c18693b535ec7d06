"""Markdown tables of what serving gains and costs."""

from collections.abc import Mapping
from typing import Any

from benchmarks.serving.contenders import ALONE, CONTENDERS
from benchmarks.serving.measure import COSTS, LOAD, MEMORY, SIMULATION, STEP_TIMES

MIB = 2**20
NONE = "Not measured."
PLOT = "![Mixed requests: waits, and capacity on other machines](plots/serving.svg)"


def steps_table(report: Mapping[str, Any]) -> str:
    """Render what a step of so many rows takes."""
    if STEP_TIMES not in report:
        return NONE
    found = report[STEP_TIMES]
    medians = {int(rows): each["median"] for rows, each in found["step_s"].items()}
    columns = " | ".join(map(str, medians))
    return "\n".join(
        [
            f"{_place(report, STEP_TIMES)}; medians of {found['request']['repeats']}. Rows gain up "
            f"to {found['gaining_rows']}; a decoder's run is "
            f"{1e3 * found['decode_s']['median']:.1f} ms.",
            "",
            f"| rows of a step | {columns} |",
            "|---|" + "---|" * len(medians),
            _row("ms a step", [f"{1e3 * seconds:.1f}" for seconds in medians.values()]),
            _row("ms a row", [f"{1e3 * s / rows:.1f}" for rows, s in medians.items()]),
        ]
    )


def load_table(report: Mapping[str, Any]) -> str:
    """Render the model that ships under load."""
    if LOAD not in report:
        return NONE
    found = report[LOAD]
    rows, count = found["request"]["rows"], found["request"]["requests"]
    heads = [
        "whole p50",
        "p95",
        "first step p50",
        "p95",
        "pictures/s",
        "mean rows",
        "peak",
        "equal",
    ]
    lines = [
        f"{_place(report, LOAD)}; {count} requests a run, {rows} rows at most, times in seconds. "
        "Peak: resident memory in MiB. Equal: pictures whose files have the bytes of those drawn "
        "alone.",
        "",
        f"| requests | load | | {' | '.join(heads)} |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    for mix, measured in found["mixes"].items():
        for load, contenders in measured["loads"].items():
            rate = f"{load} of {measured['capacity_per_s']:.2f}/s"
            lines += [
                f"| {mix} | {rate} | {name} | {' | '.join(_load_cells(told, count))} |"
                for name, told in contenders.items()
            ]
    return "\n".join(lines)


def _load_cells(told: Mapping[str, Any], count: int) -> list[str]:
    figures = told["figures"]
    waits = [figures[what][q] for what in ("whole_s", "first_step_s") for q in ("p50", "p95")]
    return [
        *(f"{seconds:.2f}" for seconds in waits),
        f"{figures['pictures_per_s']:.2f}",
        f"{figures['mean_rows']:.2f}",
        f"{told['memory']['peak_bytes'] / MIB:.0f}",
        f"{told['equal']} of {count}",
    ]


def simulation_table(report: Mapping[str, Any]) -> str:
    """Render capacity beside one at a time, and how long pictures wait, on other curves."""
    if SIMULATION not in report:
        return NONE
    found = report[SIMULATION]
    request, curves = found["request"], found["curves"]
    lines = [
        f"{request['requests']} requests a run, {request['rows']} rows at most. Capacity, of that "
        "of one at a time:",
        "",
        f"| curve | requests | {' | '.join(name for name in CONTENDERS if name != ALONE)} |",
        "|---|---|" + "---|" * (len(CONTENDERS) - 1),
    ]
    for name, curve in curves.items():
        for mix, gains in curve["capacity"].items():
            cells = [f"{gains[contender]:.2f}" for contender in CONTENDERS if contender != ALONE]
            lines.append(_row(f"{name} | {mix}", cells))
    lines += [
        "",
        f"Mixed requests, means of {request['runs']} runs, in steps of one picture alone: the "
        "whole at p50 and p95, and the first step at p95.",
        "",
        f"| curve | load | {' | '.join(CONTENDERS)} |",
        "|---|---|" + "---|" * len(CONTENDERS),
    ]
    for name, curve in curves.items():
        for load, contenders in curve["loads"].items():
            lines.append(_row(f"{name} | {load}", [_waits(w) for w in contenders.values()]))
    return "\n".join([*lines, "", PLOT])


def _waits(told: Mapping[str, Any]) -> str:
    whole, first = told["whole_s"], told["first_step_s"]
    return f"{whole['p50']:.0f}, {whole['p95']:.0f}; {first['p95']:.0f}"


def costs_table(report: Mapping[str, Any]) -> str:
    """Render what a server costs and keeps."""
    lines = ["| | median | smallest to largest |", "|---|---|---|"]
    if COSTS in report:
        found = report[COSTS]
        beside = found["one_at_a_time"]
        seconds = {
            "from the command to ready": found["ready_s"],
            f"a picture of {found['request']['steps']} steps by the pipeline": beside["pipeline_s"],
            "through the server": beside["served_s"],
        }
        lines += [
            f"| {text} | {each['median']:.2f} s | {each['min']:.2f} to {each['max']:.2f} |"
            for text, each in seconds.items()
        ]
        lines.append(f"| of the pipeline's time, round by round | {beside['ratio']:.3f} | |")
        for steps, each in found["http"].items():
            text = f"processor's time of HTTP for a request of {steps}"
            lines.append(f"| {text} | {each['http_ms']:.2f} ms | |")
    for name, each in report.get(MEMORY, {}).items():
        if name != "request":
            lines += [
                f"| {process}'s memory over {each['requests']} requests, {name}, at the end | "
                f"{each[process]['bytes'][-1] / MIB:.0f} MiB | risen by "
                f"{each[process]['risen']:.1%} after the first tenth |"
                for process in ("http", "engine")
            ]
    return "\n".join(lines) if len(lines) > 2 else NONE


def _place(report: Mapping[str, Any], part: str) -> str:
    """Say where a part was measured, and by which clock."""
    machine, request = report["machine"], report[part]["request"]
    clock = "" if request["clock"] == "wall" else ", the processor's time, all work in one thread"
    return (
        f"{machine['processor']}, {request['backend']} in {request['precision']}, "
        f"{request['threads']} threads{clock}"
    )


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
