"""What does a ControlNet add to a step, beside what diffusers' own adds to its step?

Each contender runs a guided step without nets, with one and with two, on the same weights and
inputs, in a process of its own; a round has all three in turn, so the ratio of a round is one of
neighbouring seconds. Contenders come one after the other, because each holds the UNet twice and two
nets. What a net makes of its picture is timed alone: diffusers does it in every step, the project
once a picture. Steps are compared with those of ONNX Runtime in float32.

With --out the file is written after every round, and a second call goes on where the first ended.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison_tables import not_measured, shown_flops, shown_seconds, shown_spread
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.control_nets import COUNTS, HINT, ONE, TWO, write_control_nets
from benchmarks.flops import control_flops
from benchmarks.machine import summary
from benchmarks.race import WARM_UPS, Race
from benchmarks.resumable import begin, fill, keep, named
from benchmarks.scenarios import Scenario
from engine.backends.settings import cpu_count

PLAIN = "step"
PARTS = (PLAIN, *COUNTS, HINT)
NAMES = (
    REFERENCE,
    "latentrt, OpenVINO bfloat16",
    "diffusers, eager float32",
    "diffusers, eager bfloat16",
)
GIB = 2**30


def measure(
    model: str = "sd15",
    repeats: int = 3,
    threads: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure until every contender has its rounds; raises GraphError, OutputError, RequestError.

    only: texts of which a contender's name holds one, none means all
    """
    scenario, threads = Scenario.of(model), threads or cpu_count()
    names = named("contender", NAMES, only)
    asked = {"name": "control", "model": scenario.title, "size": scenario.size, "threads": threads}
    asked |= {"guidance_scale": scenario.guidance_scale, "warm_ups": WARM_UPS}
    report = begin(asked, out, lambda: {"flops": control_flops(scenario), "contenders": {}})
    taken = report["contenders"]
    write_control_nets(scenario)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(scenario, threads, lambda name: PARTS, Path(folder))
        try:
            for name in names:
                fill(
                    taken,
                    [name],
                    repeats,
                    lambda name: race.take(name, taken[name]),
                    lambda: keep(summarised(report), out),
                )
                race.drop(name)
        finally:
            race.close()
    return summarised(report)


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with the medians of each part, and steered steps beside plain ones."""
    shown = {}
    for name, taken in report["contenders"].items():
        shown[name] = dict(taken)
        if rounds := taken["rounds"]:
            parts = rounds[0].keys()
            shown[name] |= {
                "settings": CONTENDERS[name].settings,
                "seconds": {part: summary([each[part] for each in rounds]) for part in parts},
                "ratios": {
                    part: summary([each[part] / each[PLAIN] for each in rounds]) for part in COUNTS
                },
            }
    return {**report, "contenders": shown}


def control_table(report: Mapping[str, Any]) -> str:
    """Render each contender's steps, without nets and with them, as Markdown."""
    request, contenders, flops = report["request"], report["contenders"], report["flops"]
    measured = {name: found for name, found in contenders.items() if found["rounds"]}
    rounds = max((len(found["rounds"]) for found in measured.values()), default=0)
    more = " and ".join(f"× {flops[part] / flops[PLAIN]:.2f} with {part}" for part in (ONE, TWO))
    lines = [
        f"{report['machine']['processor']}, {request['threads']} threads; {request['model']}, "
        f"{request['size']} × {request['size']}, guidance {request['guidance_scale']}, "
        f"{rounds} rounds after {request['warm_ups']} warm-ups; operations: "
        f"{shown_flops(flops[PLAIN])} a step, {more}, {shown_flops(flops[HINT])} a hint.",
        "",
        "| | a guided step | with a ControlNet | with two | a picture's hint | memory "
        "| error with one |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, found) for name, found in measured.items()),
        "",
        "Medians, smallest to largest; a factor is the time beside the step without nets, by "
        "round. Diffusers encodes the picture in every step, so its steps have that in them.",
        "",
        *(f"- {name}: {found['settings']}" for name, found in measured.items()),
        *not_measured(contenders),
    ]
    return "\n".join(lines).rstrip()


def _row(name: str, found: Mapping[str, Any]) -> str:
    seconds, agreement = found["seconds"], found.get("agreement", {})
    error = agreement.get(f"{ONE}_relative_error")
    cells = [
        shown_spread(seconds[PLAIN]),
        *(
            f"{shown_seconds(seconds[part]['median'])}, × {_factor(found, part)}"
            for part in (ONE, TWO)
        ),
        shown_spread(seconds[HINT]) + " once" if HINT in seconds else "in every step",
        f"{found['peak_bytes'] / GIB:.1f} GiB",
        "–" if error is None else f"{error:.1g}",
    ]
    if agreement.get("agrees") is False:
        cells[-1] += ", **computes something else**"
    return f"| {name} | {' | '.join(cells)} |"


def _factor(found: Mapping[str, Any], part: str) -> str:
    median, low, high = (f"{found['ratios'][part][key]:.2f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"
