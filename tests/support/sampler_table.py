"""Measure every sampler with every schedule and write the table of docs/samplers.md."""

import sys
from pathlib import Path

from runtime.samplers import SAMPLERS, SCHEDULES
from tests.support.schedulers import CLASSES, CONFIG, TRAINED_TIMESTEPS, largest_error

DOCUMENT = Path(__file__).parents[2] / "docs" / "samplers.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
# CFG++'s methods are given two outputs: tests/runtime/test_guidance_variants.py has them.
MEASURED = [name for name in SAMPLERS if not name.endswith("cfg_pp")]
# Others' variants differ from these in their levels alone.
CURVES = [name for name in SCHEDULES[3:] if not name.startswith(("a1111", "comfyui"))]
# steps, strength and prediction. At even numbers of steps sgm_uniform has timesteps between two
# whole ones
CASES = [(21, None, "epsilon"), (7, 0.6, "v_prediction"), (15, None, "sample")]
NO_SAMPLE = ("plms", "edm_euler")  # diffusers' schedulers do not take a predicted x0
# Where more than 1e-5 lies between us and diffusers, because float32 leaves its tables' smallest
# sigmas five digits, and a timestep that it looks up from a float32 logarithm three decimals
FLOAT32_TABLES = {
    "euler_a": ("karras", "exponential"),
    "ipndm": ("karras", "exponential"),
    "heun": (None, "beta"),
    "dpm2": (None, "karras", "exponential", "beta", "normal", "kl_optimal"),
    "dpm2_a": (None, "karras", "exponential", "beta", "normal", "kl_optimal"),
    "dpmpp_sde": (None, "karras", "exponential", "beta", "normal", "kl_optimal"),
    "dpmpp_2s_a": ("karras", "exponential"),
    "dpmpp_2m": ("karras", "exponential"),
    "dpmpp_2m_sde": ("karras", "exponential"),
    "dpmpp_3m_sde": ("karras", "exponential", "beta"),
    "dpmpp_2s": ("exponential",),
    "unipc": ("karras", "exponential"),
    "comfyui_uni_pc": ("karras", "exponential", "beta"),
    "comfyui_uni_pc_bh2": ("karras", "exponential"),
}


def combinations():
    """List every sampler with every schedule that it takes; None is its own."""
    for name in MEASURED:
        yield name, None
        if name == "edm_euler":
            yield from ((name, schedule) for schedule in ("karras", "exponential"))
        elif name not in TRAINED_TIMESTEPS:
            yield from ((name, schedule) for schedule in CURVES)


def measure(name, schedule, tables="float32"):
    """Return the largest error of the runs that the table stands on."""
    return max(
        largest_error(
            name,
            steps,
            schedule,
            strength=strength,
            config={**CONFIG, "prediction_type": kind},
            tables=tables,
        )[0]
        for steps, strength, kind in CASES
        if not (kind == "sample" and name in NO_SAMPLE)
    )


def table():
    """Render the table in Markdown."""
    allowed = set(combinations())
    lines = ["| | own | " + " | ".join(CURVES) + " |", "|---" * (len(CURVES) + 2) + "|"]
    for name in MEASURED:
        cells = []
        for schedule in (None, *CURVES):
            starred = name not in CLASSES or (name == "euler_a" and schedule)
            inexact = schedule in FLOAT32_TABLES.get(name, ())
            marks = "*" * bool(starred) + "†" * inexact
            there = (name, schedule) in allowed
            cells.append(f"{measure(name, schedule):.0e}{marks}" if there else "–")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Write the table where the document marks its place."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
