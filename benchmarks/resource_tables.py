"""Markdown tables of memory, of what is built, and of how time grows."""

from collections.abc import Mapping
from typing import Any

from benchmarks.comparison_tables import not_measured, shown_seconds, shown_spread
from benchmarks.scale import AXES, along
from benchmarks.scenarios import WHOLE

GIB, MIB = 2**30, 2**20
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of a number
STAGES = {
    "import": "imports",
    "load": "model",
    "open text": "text encoder opened",
    "text": "run",
    "open step": "UNet opened",
    "step": "first step",
    "open decode": "decoder opened",
    "decode": "run",
}


def memory_table(report: Mapping[str, Any]) -> str:
    """Render the peak up to each stage, what stays resident, and the peak beside the weights."""
    measured = {k: v for k, v in report["contenders"].items() if v["rounds"]}
    request, numbers = report["request"], report["weights"]["numbers"]
    heads = [*STAGES.values(), "resident after it", "peak", "of the weights"]
    rounds = max((len(found["rounds"]) for found in measured.values()), default=0)
    lines = [
        f"{report['machine']['processor']}, {request['threads']} threads; {request['model']}, "
        f"{request['size']} × {request['size']}, guidance {request['guidance_scale']}: "
        f"{numbers / 1e6:.1f} million weights, {_bytes(4 * numbers)} in float32; the largest "
        f"resident memory of the process up to each stage, the largest of {rounds} rounds.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
        *(_memory_row(name, found, numbers) for name, found in measured.items()),
        "",
        "In the last column the peak beside the weights' size in the contender's own precision.",
        *not_measured(report["contenders"]),
    ]
    return "\n".join(lines)


def _memory_row(name: str, found: Mapping[str, Any], numbers: int) -> str:
    rounds = found["rounds"]
    cells = [
        _bytes(max(each[stage]["peak_bytes"] for each in rounds)) if stage in rounds[0] else "–"
        for stage in STAGES
    ]
    last = WHOLE if WHOLE in rounds[0] else "decode"
    resident = max(each[last]["resident_bytes"] for each in rounds)
    peak = max(each[last]["peak_bytes"] for each in rounds)
    weights = numbers * WIDTHS[found["precision"]]
    cells += [_bytes(resident), f"**{_bytes(peak)}**", f"{peak / weights:.2f} times"]
    return f"| {name} | {' | '.join(cells)} |"


def build_table(report: Mapping[str, Any]) -> str:
    """Render tracing with the sizes of graphs, then the opening of engines."""
    tasks = {k: v for k, v in report["tasks"].items() if "figures" in v}
    rounds = max((len(found["rounds"]) for found in tasks.values()), default=0)
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {report['request']['threads']} threads, medians of {rounds} "
        "rounds, smallest to largest, each in a process of its own.",
        "",
        "| traced to ONNX | time | peak memory | nodes | graph | compressed |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in tasks.items():
        if name.startswith("trace "):
            figures = found["figures"]
            graph, packed = (figures[key]["median"] for key in ("bytes", "compressed_bytes"))
            lines.append(
                f"| {name.removeprefix('trace ')} | {shown_spread(figures['seconds'])} "
                f"| {_bytes(figures['peak_bytes']['max'])} | {figures['nodes']['median']:.0f} "
                f"| {graph / 1e3:.0f} kB | {packed / 1e3:.0f} kB |"
            )
    heads = ("text", "step", "decode")
    lines += [
        "",
        "| engines opened | time | text encoder | UNet | decoder | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in tasks.items():
        if name.startswith("open "):
            figures = found["figures"]
            parts = " | ".join(f"{figures[f'{part}_s']['median']:.2f} s" for part in heads)
            lines.append(
                f"| {name.removeprefix('open ')} | {shown_spread(figures['seconds'])} | {parts} "
                f"| {_bytes(figures['peak_bytes']['max'])} |"
            )
    lines += ["", *not_measured(report["tasks"])]
    return "\n".join(lines).rstrip()


def scale_table(report: Mapping[str, Any]) -> str:
    """Render the time along each axis, and what of it a picture takes."""
    request, base = report["request"], report["request"]["base"]
    fixed = ", ".join(f"{axis} {value}" for axis, value in base.items())
    lines = [
        f"{report['machine']['processor']}; {request['model']}, {request['backend']} in "
        f"{request['precision']}, {request['timed']}, guidance {request['guidance_scale']}; one "
        f"axis changes, the others are {fixed}.",
        "",
        "| | | time, smallest to largest | a picture | peak memory |",
        "|---|---|---|---|---|",
    ]
    for axis, title in AXES.items():
        found = along(report, axis)
        for value, taken in found.items() if len(found) > 1 else ():
            picture = taken["seconds"]["median"] / taken["point"]["batch"]
            lines.append(
                f"| {title} | {value} | {shown_spread(taken['seconds'])} "
                f"| {shown_seconds(picture)} | {_bytes(taken['peak_bytes']['max'])} |"
            )
    lines += ["", *not_measured(report["points"])]
    return "\n".join(lines).rstrip()


def bfloat16_table(report: Mapping[str, Any]) -> str:
    """Render what float32 in places brings beside bfloat16: errors and times."""
    request, cases = report["request"], report["cases"]
    drawn = any("psnr_db" in found for found in cases.values())
    lines = [
        f"{report['machine']['processor']}, {request['threads']} threads; {request['model']}, "
        f"{request['size']} × {request['size']}, guidance {request['guidance_scale']}, OpenVINO "
        f"bfloat16, {request['repeats']} steps each.",
        "",
        "| in float32 | error of a guided step | a step |" + (" pictures |" if drawn else ""),
        "|---|---|---|" + ("---|" if drawn else ""),
    ]
    for name, found in cases.items():
        row = f"| {name} | {found['relative_error']:.3f} | {shown_spread(found['seconds'])} |"
        if drawn:
            decibels = found["psnr_db"]
            row += f" {decibels['median']:.1f} dB, {decibels['min']:.1f} to {decibels['max']:.1f} |"
        lines.append(row)
    return "\n".join(lines)


def processors_table(report: Mapping[str, Any]) -> str:
    """Render the backends by instruction set, and what is chosen there."""
    request = report["request"]
    lines = [
        f"{report['machine']['processor']}, {request['threads']} threads; {request['model']}, "
        f"{request['size']} × {request['size']}, {request['steps']} guided steps and the decode, "
        f"medians of {request['repeats']}, each in a process of its own.",
        "",
        "| instructions | backend | a request | a step | the decode | |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in report["sets"].items():
        for way, taken in found["ways"].items():
            if "seconds" in taken:
                times = [taken["seconds"][part]["median"] for part in ("step", "decode")]
                cells = [shown_seconds(value) for value in (taken["request_s"], *times)]
                mark = "chosen" if way == found.get("chosen") else ""
                lines.append(f"| {name} | {way} | {' | '.join(cells)} | {mark} |")
    lines.append("")
    for name, found in report["sets"].items():
        lines += [f"{line} on {name}" for line in not_measured(found["ways"])]
    return "\n".join(lines).rstrip()


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"
