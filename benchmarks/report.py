"""The tables of benchmarks in the README and the documentation, made from the committed JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison_tables import latency_table, quality_table, speed_table
from benchmarks.control import control_table
from benchmarks.gpu_summary import gpu_table
from benchmarks.image_noise import noise_table
from benchmarks.resource_tables import (
    bfloat16_table,
    build_table,
    memory_table,
    processors_table,
    scale_table,
)
from benchmarks.serving.tables import costs_table, load_table, simulation_table, steps_table
from benchmarks.theory import guidance_table
from benchmarks.tuning import tuning_table
from engine.errors import OutputError
from training.search_report import table as search_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
# The pages, and which benchmarks' tables are in each.
PAGES: Mapping[Path, Sequence[str]] = {
    README: ("speed",),
    README.parent / "docs" / "benchmarks.md": (
        "latency-sd15",
        "latency-sdturbo",
        "latency",
        "prompt",
        "quality",
        "memory",
        "memory-sd15",
        "load",
        "overhead",
        "build",
        "scale",
        "scale-sd15",
    ),
    README.parent / "docs" / "control.md": ("control-sd15",),
    README.parent / "docs" / "gpu.md": ("gpu",),
    README.parent / "docs" / "modes.md": ("image-noise",),
    README.parent / "docs" / "marking.md": ("watermark",),
    README.parent / "docs" / "performance.md": (
        "processors-sd15",
        "processors",
        "bfloat16-sd15",
        "bfloat16",
    ),
    README.parent / "docs" / "serving.md": (
        "serving-steps",
        "serving",
        "serving-simulation",
        "serving-costs",
    ),
    README.parent / "docs" / "theory.md": ("theory",),
    README.parent / "docs" / "training.md": ("search", "tuning"),
}
SOURCES = {  # tables that are made of another's figures
    "speed": "latency-sd15",
    "serving-steps": "serving",
    "serving-simulation": "serving",
    "serving-costs": "serving",
}
BEGIN, END = "<!-- begin: python -m benchmarks report: {} -->", "<!-- end: {} -->"
# Rows of each benchmark: what a figure is called, and how it is shown.
ROWS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "prompt": {
        "whole_process_s": ("whole process, interpreter start to PNG on disk", "{:.2f} s"),
        "imports_s": ("of which imports", "{:.2f} s"),
        "open_engines_s": ("of which reading the model and opening three engines", "{:.2f} s"),
        "first_picture_s": ("of which the picture, PNG included", "{:.2f} s"),
        "warm_picture_s": ("a further picture in the same process", "{:.2f} s"),
        "first_outside_engines_share": ("share of the first picture that is not engines", "{:.1%}"),
        "warm_outside_engines_share": (
            "share of a further picture that is not engines",
            "{:.1%}",
        ),
    },
    "load": {
        "imports_s": ("interpreter and imports", "{:.2f} s"),
        "read_file_s": ("what the file is, where its tensors are", "{:.2f} s"),
        "open_text_encoder_s": ("text encoder ready", "{:.2f} s"),
        "open_step_s": ("UNet ready", "{:.2f} s"),
        "encode_prompt_s": ("prompt encoded", "{:.2f} s"),
        "file_to_first_step_begun_s": ("**file to first step, begun**", "{:.2f} s"),
        "first_step_s": ("the first step", "{:.2f} s"),
        "file_to_first_step_done_s": ("**file to first step, done**", "{:.2f} s"),
        "peak_share": ("peak resident memory, of the float32 weights' size", "{:.2f} times"),
        "lora_on_s": ("a LoRA put on the loaded pipeline", "{:.2f} s"),
        "lora_weight_changed_s": ("its weight changed", "{:.2f} s"),
        "lora_off_s": ("taken off", "{:.2f} s"),
    },
    "overhead": {
        f"{sampler}_{size}": (f"{sampler}, {text}", form)
        for sampler in ("ddim", "euler_a", "unipc")
        for size, text, form in (
            ("ms", "the model that ships", "{:.3f} ms"),
            ("large_ms", "Stable Diffusion 1.5's sizes", "{:.3f} ms"),
            ("large_percent", "of the least that such a step takes", "{:.4f} %"),
        )
    },
}


def table(name: str, report: Mapping[str, Any]) -> str:
    """Render a benchmark's report as Markdown: medians with their spread."""
    lines = [_heading(name, report), "", "| | median | smallest to largest |", "|---|---|---|"]
    for figure, (text, form) in ROWS[name].items():
        value = report[figure]
        median, low, high = (form.format(value[key]) for key in ("median", "min", "max"))
        lines.append(f"| {text} | {median} | {low.split()[0]} to {high} |")
    return "\n".join(lines)


def _heading(name: str, report: Mapping[str, Any]) -> str:
    machine, request = report["machine"], report["request"]
    place = (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['peak_gflops']:.0f} GFLOP/s in float32, Python {machine['python']}"
    )
    repeats = f"{request['repeats']} repeats after a warm-up"
    if name == "overhead":
        return f"{place}; {request['steps']} steps, {repeats}."
    if name == "prompt":
        scale = request["guidance_scale"]
        return f"{place}; {request['steps']} steps, guidance {scale}, {repeats}."
    size = report["file_bytes"] / 1e9
    return f"{place}; {request['model']}, {size:.1f} GB of float16, {repeats}."


def watermark_table(report: Mapping[str, Any]) -> str:
    """Render what a watermark withstands as Markdown."""
    request, quality = report["request"], report["psnr_db"]
    sizes = ", ".join(map(str, request["sizes"]))
    lines = [
        f"{request['pictures']} pictures of the model that ships, {sizes} pixels wide; a marked "
        f"one beside the one without: {quality['median']:.1f} dB ({quality['min']:.1f} to "
        f"{quality['max']:.1f}). Found in those without one: {report['found_without_one']:.0%}.",
        "",
        "| after | bits read wrong, mean | at most | text found |",
        "|---|---|---|---|",
    ]
    for name, text in WATERMARK_ROWS.items():
        error = report[name]["bit_error"]
        found = report[name]["found"]
        lines.append(f"| {text} | {error['mean']:.2%} | {error['max']:.1%} | {found:.0%} |")
    return "\n".join(lines)


WATERMARK_ROWS: Mapping[str, str] = {
    "unchanged": "nothing",
    "jpeg_75": "JPEG, quality 75",
    "half": "resizing to half",
    "cropped_tenth": "cropping a tenth of each side",
    "cropped_tenth_jpeg_75": "cropping, then JPEG 75",
    "half_jpeg_75": "resizing to half, then JPEG 75",
}
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    **{name: partial(table, name) for name in ROWS},
    "latency": latency_table,
    "latency-sd15": latency_table,
    "latency-sdturbo": latency_table,
    "quality": quality_table,
    "memory": memory_table,
    "memory-sd15": memory_table,
    "bfloat16": bfloat16_table,
    "bfloat16-sd15": bfloat16_table,
    "build": build_table,
    "control-sd15": control_table,
    "gpu": gpu_table,
    "image-noise": noise_table,
    "processors": processors_table,
    "processors-sd15": processors_table,
    "scale": scale_table,
    "scale-sd15": scale_table,
    "speed": speed_table,
    "tuning": tuning_table,
    "watermark": watermark_table,
    "search": search_table,
    "theory": guidance_table,
    "serving-steps": steps_table,
    "serving": load_table,
    "serving-simulation": simulation_table,
    "serving-costs": costs_table,
}


def pages() -> dict[Path, str]:
    """Return the pages with their tables made anew; raises OutputError when one has no place.

    A benchmark without committed figures has no table.
    """
    made = {}
    for page, names in PAGES.items():
        text = page.read_text(encoding="utf-8")
        for name in names:
            if _file(name).is_file():
                text = inserted(text, name, page.name)
        made[page] = text
    return made


def inserted(text: str, name: str, page: str) -> str:
    """Put a benchmark's table between its two lines; raises OutputError when they are missing."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise OutputError(f"{page} has no lines {begin!r} and {end!r}; put them back")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n{TABLES[name](committed(name))}\n{end}{after}"


def committed(name: str) -> dict[str, Any]:
    """Read a benchmark's committed report."""
    values: dict[str, Any] = json.loads(_file(name).read_text(encoding="utf-8"))
    return values


def _file(name: str) -> Path:
    return RESULTS / f"{SOURCES.get(name, name)}.json"
