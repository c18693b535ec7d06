"""Markdown tables of the benchmarks that compare contenders or settings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.contenders import CONTENDERS, FULL, PEAK, REFERENCE
from benchmarks.machine import summary
from benchmarks.rounds import ratios
from benchmarks.scenarios import PARTS, WHOLE, whole_of

HEADS = {
    WHOLE: "whole request",
    "text": "text",
    "step": "guided UNet step",
    "decode": "VAE decode",
}
QUALITY_HEADS = {
    "features": "distance of features, median",
    "times_faster": "faster, median",
    "match": "held-out match",
}
GIB = 2**30
LOSSES = (("bfloat16", "float32"), ("int8", "bfloat16"))  # a precision, and the one that it saves


def latency_table(report: Mapping[str, Any]) -> str:
    """Render contenders with their medians, spreads and shares of the machine's peak."""
    contenders = {k: v for k, v in report["contenders"].items() if k != PEAK}
    measured = {name: found for name, found in contenders.items() if found["rounds"]}
    parts = _heads(report["request"])
    heads = [*parts.values(), "memory", "error of a step"]
    lines = [
        _latency_heading(report),
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
        *(_row(name, found, measured, parts) for name, found in measured.items()),
        "",
        "Medians, smallest to largest; in brackets the share of that precision's peak, by the "
        "operations of the project's own graphs (latentrt's engines on OpenVINO convolve with "
        "fewer, so a part can pass 100%). "
        "A factor is the time beside that of the first row.",
        "",
        *(f"- {name}: {found['settings']}" for name, found in measured.items()),
        *not_measured(contenders),
        *_speedups(report, measured),
    ]
    return "\n".join(lines)


SPEED_ROWS = (  # of the short table: the fastest precision, the next, and the peers of that one
    "latentrt, OpenVINO int8",
    "latentrt, OpenVINO bfloat16",
    "optimum-intel, OpenVINO bfloat16",
    "diffusers, torch.compile bfloat16",
)


def speed_table(report: Mapping[str, Any]) -> str:
    """Render four contenders and the machine in a line."""
    machine, request = report["machine"], report["request"]
    found = {name: report["contenders"][name] for name in SPEED_ROWS}
    slowest = SPEED_ROWS[-1]
    lines = [
        f"| {request['model']}, {request['size']} × {request['size']}, {request['steps']} steps "
        "| whole request | times as fast | memory |",
        "|---|---|---|---|",
    ]
    for name, each in found.items():
        median = each["parts"][WHOLE]["median"]
        faster = summary(ratios(report, slowest, name)) if name != slowest else {"median": 1.0}
        memory = f"{each['peak_bytes'] / GIB:.1f} GiB"
        lines.append(f"| {name} | {median:.0f} s | {faster['median']:.2f} | {memory} |")
    return "\n".join([*lines, "", f"{machine['processor']}, {request['threads']} threads."])


def _speedups(report: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """Say how many times faster the project's own contenders are than what they compare with."""
    wholes = [part for part in _heads(report["request"]) if part.startswith(WHOLE)]
    rows = []
    for name in filter(_is_own, measured):
        for other in measured:
            if _compares(name, other):
                faster = (_times(ratios(report, other, name, whole)) for whole in wholes)
                rows.append(f"| {name} | {other} | {' | '.join(faster)} |")
    times = ["times, by round", *(HEADS[WHOLE] + of for of in map(_of_steps, wholes[1:]))]
    head = ["", f"| | is faster than | {' | '.join(times)} |", "|---|---|" + "---|" * len(times)]
    return [*head, *rows] if rows else []


def _times(factors: Sequence[float]) -> str:
    found = summary(factors)
    median, low, high = (f"{found[key]:.2f}" for key in ("median", "min", "max"))
    return f"{median}, {low} to {high}"


def _heads(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of a request's parts: a second one of more steps behind the first."""
    heads = dict(HEADS)
    if request["guidance_scale"] <= 1:
        heads["step"] = "UNet step"
    if not (steps := request.get("more_steps")):
        return heads
    more = whole_of(steps)
    whole = heads.pop(WHOLE)
    return {WHOLE: whole, more: whole + _of_steps(more), **heads}


def _of_steps(whole: str) -> str:
    return whole.removeprefix(WHOLE)


def _is_own(name: str) -> bool:
    return name.startswith("latentrt")


def _compares(name: str, other: str) -> bool:
    """Tell whether these compute in one precision, or one of two of the project's costs quality."""
    contender, theirs = CONTENDERS[name], CONTENDERS[other]
    if not _is_own(other):
        same = contender.precision == theirs.precision and contender.draws == theirs.draws
        return same and not contender.saves
    if contender.draws or theirs.draws:
        return other == f"{name}, {FULL}"
    if contender.saves:
        return name.startswith(f"{other}, ")
    return (contender.precision, theirs.precision) in LOSSES and not theirs.saves


def not_measured(taken: Mapping[str, Any]) -> list[str]:
    """Say of each that was left out why."""
    return [
        f"- not measured: {name} ({found['skipped']})"
        for name, found in taken.items()
        if "skipped" in found
    ]


def _latency_heading(report: Mapping[str, Any]) -> str:
    machine, request, peaks = report["machine"], report["request"], report["peak_gflops"]
    rounds = [len(v["rounds"]) for k, v in report["contenders"].items() if k != PEAK]
    peak = ", ".join(f"{rate:.0f} GFLOP/s in {precision}" for precision, rate in peaks.items())
    heads = _heads(request)
    flops = ", ".join(f"{shown_flops(report['flops'][part])} {heads[part]}" for part in PARTS)
    whole = f"; the whole request is the sum of its parts, {request['steps']} of them steps"
    return (
        f"{machine['processor']}, {request['threads']} threads, {peak}; {request['model']}, "
        f"{request['size']} × {request['size']}, {request['steps']} steps, guidance "
        f"{request['guidance_scale']}, {max(rounds, default=0)} rounds after {request['warm_ups']} "
        f"warm-ups{whole if request['whole_is_a_sum'] else ''}; {flops}."
    )


def _row(
    name: str, found: Mapping[str, Any], measured: Mapping[str, Any], parts: Iterable[str]
) -> str:
    cells = []
    for part in parts:
        if part not in found["parts"]:
            cells.append("–")
            continue
        times, share = found["parts"][part], found["peak_share"][part]
        cell = shown_spread(times)
        if share is not None:
            cell += f" ({share:.0%})"
        if part == WHOLE and REFERENCE in measured:
            first = measured[REFERENCE]["parts"][WHOLE]["median"]
            cell += f", × {times['median'] / first:.2f}"
        cells.append(cell)
    cells.append(f"{found['peak_bytes'] / GIB:.2f} GiB")
    agreement = found.get("agreement", {})
    error = agreement.get("step_relative_error")
    cells.append("–" if error is None else f"{error:.1g}")
    if agreement.get("agrees") is False:
        cells[-1] += ", **computes something else**"
    return f"| {name} | {' | '.join(cells)} |"


def shown_spread(times: Mapping[str, float]) -> str:
    """Write a median, and the smallest and the largest beside it."""
    median, low, high = (shown_seconds(times[key]) for key in ("median", "min", "max"))
    return f"{median}, {low} to {high}"


def shown_seconds(value: float) -> str:
    """Write a time as it is read best."""
    return f"{1e3 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def shown_flops(count: float) -> str:
    """Write a number of operations as it is read best."""
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def quality_table(report: Mapping[str, Any]) -> str:
    """Render settings with how far their pictures are from float32's."""
    request, settings = report["request"], report["settings"]
    heads = ["PSNR, median", "smallest", "allowed", "SSIM, median", "smallest", "allowed"]
    extra = {
        key: head
        for key, head in QUALITY_HEADS.items()
        if any(key in found for found in settings.values())
    }
    heads += extra.values()
    lines = [
        f"{request['model']}, {request['pictures']} prompts, {request['steps']} steps, against "
        "the pictures of ONNX Runtime in float32 of the same seeds.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    for name, found in settings.items():
        if "skipped" in found:
            lines.append(f"| {name} | not measured: {found['skipped']} |" + " |" * (len(heads) - 1))
            continue
        decibels, similar, bound = found["psnr_db"], found["ssim"], found["bound"]
        lines.append(
            f"| {name} | {decibels['median']:.1f} dB | {decibels['min']:.1f} dB "
            f"| {bound['psnr_db']:.0f} dB | {similar['median']:.4f} | {similar['min']:.4f} "
            f"| {bound['ssim']} |" + "".join(f" {_extra(key, found)} |" for key in extra)
        )
    if matched := report.get("reference", {}).get("match"):
        lines += ["", f"The reference's own pictures match in {_match(matched)}."]
    if str(request.get("features", "")).startswith("no "):
        lines += ["", f"Distances of features are left out: {request['features']}."]
    return "\n".join(lines)


def _extra(key: str, found: Mapping[str, Any]) -> str:
    if key not in found:
        return "–"
    if key == "match":
        return _match(found[key])
    median = found[key]["median"]
    if key == "times_faster":
        return f"{median:.2f} times, beside {found['beside']}"
    allowed = found["bound"].get(key)
    return f"{median:.4f}" + ("" if allowed is None else f", up to {allowed}")


def _match(match: Mapping[str, float]) -> str:
    return f"{match['top_1']:.1%}, in five {match['top_5']:.1%} of {match['pictures']}"
