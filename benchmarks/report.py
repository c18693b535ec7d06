"""The README's benchmark table, made from the committed JSON."""

import json
from pathlib import Path
from typing import Any

from engine.errors import OutputError

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin: python -m benchmarks report -->", "<!-- end -->"
ROWS = {
    "whole_process_s": "whole process, interpreter start to PNG on disk",
    "imports_s": "of which imports",
    "open_engines_s": "of which reading the model and opening three engines",
    "first_picture_s": "of which the picture, PNG included",
    "warm_picture_s": "a further picture in the same process",
}
SHARES = {
    "first_outside_engines_share": "share of the first picture that is not engines",
    "warm_outside_engines_share": "share of a further picture that is not engines",
}


def table(report: dict[str, Any]) -> str:
    """Render the report of `benchmarks.prompt` as Markdown: medians with their spread."""
    machine, request = report["machine"], report["request"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}; "
        f"{request['steps']} steps, guidance {request['guidance_scale']}, "
        f"{request['repeats']} repeats after a warm-up.",
        "",
        "| | median | smallest to largest |",
        "|---|---|---|",
    ]
    for name, text in ROWS.items():
        value = report[name]
        lines.append(
            f"| {text} | {value['median']:.2f} s | {value['min']:.2f} to {value['max']:.2f} s |"
        )
    for name, text in SHARES.items():
        value = report[name]
        lines.append(
            f"| {text} | {value['median']:.1%} | {value['min']:.1%} to {value['max']:.1%} |"
        )
    return "\n".join(lines)


def insert(readme: str, report: dict[str, Any]) -> str:
    """Return the README with its table replaced; raises OutputError when it has no place for it."""
    if BEGIN not in readme or END not in readme:
        raise OutputError(f"README.md has no lines {BEGIN!r} and {END!r}; put them back")
    before, rest = readme.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


def committed() -> dict[str, Any]:
    """Read the committed report of the prompt benchmark."""
    values: dict[str, Any] = json.loads((RESULTS / "prompt.json").read_text(encoding="utf-8"))
    return values
