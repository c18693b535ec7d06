"""What does training a Stable Diffusion 1.5 on take: seconds a step and memory?

`python -m training lora` and `fine-tune` are run as a user does, each in a process of its own,
every round anew, on a checkpoint of random weights in the published sizes and on pictures of noise.
With --out the file is written after every measurement, and a second call goes on where the first
ended.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.comparison_tables import not_measured, shown_spread
from benchmarks.machine import peak_bytes, summary
from benchmarks.resumable import begin, fill, keep, named
from benchmarks.scenarios import SCENARIOS
from benchmarks.worker import once
from engine.backends.settings import cpu_count
from engine.errors import BackendError, RequestError

MODEL = "sd15"
PICTURES = 4
BOUND_S = 3600.0  # of a training
# What is run, by what it is called in the table: arguments of `python -m training`.
TRAININGS: Mapping[str, Sequence[str]] = {
    "lora": ("lora",),
    "lora --no-recompute": ("lora", "--no-recompute"),
    "lora --layers all --text-encoder": ("lora", "--layers", "all", "--text-encoder"),
    "lora --precision float32": ("lora", "--precision", "float32"),
    "fine-tune": ("fine-tune",),
}


def measure(
    repeats: int = 1,
    threads: int | None = None,
    only: Sequence[str] = (),
    steps: int = 6,
    size: int = 512,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run each training until it has its rounds; raises OutputError, RequestError.

    only: texts of which a training's name holds one; size: of pictures in pixels
    """
    threads = threads or cpu_count()
    names = named("training", TRAININGS, only)
    if steps < 1:
        raise RequestError(f"--steps is {steps}; give 1 or more")
    scenario = SCENARIOS[MODEL]
    request = {"model": scenario.title, "size": size, "steps": steps, "threads": threads}
    report = begin(request, out, lambda: {"trainings": {}})
    model = scenario.model()

    def take(name: str) -> dict[str, Any]:
        return once(
            "benchmarks.tuning",
            "trained",
            TRAININGS[name],
            str(model),
            steps,
            size,
            threads,
            threads=threads,
            bound_s=BOUND_S,
        )

    fill(report["trainings"], names, repeats, take, lambda: keep(_summarised(report), out))
    return _summarised(report)


def trained(
    arguments: Sequence[str], model: str, steps: int, size: int, threads: int
) -> dict[str, Any]:
    """Run a training in this process; returns seconds of a step, the peak in bytes, what learns.

    Raises BackendError with what the command says when it does not come to its end.
    """
    from training.__main__ import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pictures(folder / "pictures", size)
        asked = {
            "--model": model,
            "--images": folder / "pictures",
            "--work": folder / "work",
            "--out": folder / "tuned",
            "--size": size,
            "--steps": steps,
            "--threads": threads,
        }
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main([*arguments, *(str(part) for pair in asked.items() for part in pair)])
        if status:
            raise BackendError(said.getvalue().strip().splitlines()[-1])
        facts = json.loads((folder / "work" / "tuning.json").read_text(encoding="utf-8"))
    return {
        "seconds": facts["seconds_a_step"],
        "peak_bytes": peak_bytes(),
        "parameters": facts["parameters"],
    }


def tuning_table(report: Mapping[str, Any]) -> str:
    """Render the figures as Markdown: a row for each training."""
    request, machine = report["request"], report["machine"]
    found = {name: each for name, each in report["trainings"].items() if "figures" in each}
    lines = [
        f"{machine['processor']}, {request['threads']} threads; {request['model']}, "
        f"{request['size']} × {request['size']}, one picture a step, means of {request['steps']} "
        "steps with the first; the peak is the whole command's, the encoding of pictures included.",
        "",
        "| | learns | a step | peak memory |",
        "|---|---|---|---|",
    ]
    for name, each in found.items():
        figures = each["figures"]
        lines.append(
            f"| `{name}` | {figures['parameters']['median'] / 1e6:.1f} million "
            f"| {shown_spread(figures['seconds'])} "
            f"| {figures['peak_bytes']['max'] / 2**30:.1f} GiB |"
        )
    return "\n".join([*lines, "", *not_measured(report["trainings"])]).rstrip()


def _write_pictures(folder: Path, size: int) -> None:
    """Write pictures of noise, each with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n", encoding="utf-8")


def _summarised(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with each training's median and spread."""
    for found in report["trainings"].values():
        if rounds := found["rounds"]:
            found["figures"] = {key: summary([each[key] for each in rounds]) for key in rounds[0]}
    return report
