"""`python -m benchmarks`: measure, print, write JSON; make tables and plots of it."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks import (
    agreement,
    batch,
    bfloat16,
    build,
    card,
    control,
    gpu,
    gpu_summary,
    image_noise,
    latency,
    load,
    memory,
    overhead,
    plots,
    processors,
    prompt,
    quality,
    report,
    scale,
    theory,
    tuning,
    watermark,
)
from benchmarks.options import add_card, add_compared, add_gpu, add_model, add_only
from benchmarks.resumable import read_report
from benchmarks.serving.load import CLOCKS, Drawing
from benchmarks.serving.measure import PARTS, Choice
from benchmarks.serving.measure import measure as measure_serving
from engine.backends.settings import PRECISIONS, ComputePrecision
from engine.command_line import CommandParser
from engine.errors import RequestError, exit_status, libraries_of
from engine.store.cache import check_writable, write_atomically

EXCEEDED = 1
FOR_A_CARD = ("gpu", "card")
ATTACH = "of a card that is not in benchmarks/results yet, please attach them to an issue"
_MEASURES = {
    "prompt": prompt.measure,
    "load": load.measure,
    "overhead": overhead.measure,
    "watermark": watermark.measure,
    "batch": batch.measure,
}
_COMPARED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "memory": memory.measure,
    "build": build.measure,
    "scale": scale.measure,
    "quality": quality.measure,
    "gpu": gpu.measure,
    "image-noise": image_noise.measure,
    "theory": theory.measure,
    "bfloat16": bfloat16.measure,
    "processors": processors.measure,
    "control": control.measure,
    "tuning": tuning.measure,
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run a benchmark; return its exit status.

    prog: what the usage calls it
    """
    return exit_status(
        lambda: _run(_parser(prog), arguments),
        cancelled="cancelled",
    )


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    options = parser.parse_args(arguments)
    if options.benchmark == "report":
        for page, text in report.pages().items():
            _write(page, text)
        for path in plots.draw():
            print(path)
        return 0
    for name in ("repeats", "threads"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            parser.error(f"--{name} is {number}; give 1 or more")
    if out := getattr(options, "out", None):
        check_writable(out)
    with libraries_of("bench"):
        measured = _measure(options)
    if options.benchmark in FOR_A_CARD and options.out:
        print(f"note: the figures are in {options.out}; {ATTACH}", file=sys.stderr)
    if options.benchmark == "card":  # has written and printed each section
        return EXCEEDED if card.failed(measured) else 0
    text = json.dumps(measured, indent=2) + "\n"
    if options.out:
        _write(options.out, text)
    if options.benchmark == "gpu":
        text = gpu_summary.gpu_table(measured) + "\n"
    print(text, end="")
    if measured.get("exceeded"):
        print(f"error: beyond their bounds: {', '.join(measured['exceeded'])}", file=sys.stderr)
        return EXCEEDED
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.benchmark == "latency":
        choice = latency.Choice.of(
            options.model,
            repeats=options.repeats,
            threads=options.threads,
            only=options.only,
            whole=options.whole,
        )
        return latency.measure(choice, options.out)
    if options.benchmark == "serving":
        return measure_serving(_serving_choice(options), options.out)
    if options.benchmark == "agree":
        return agreement.compared(read_report(options.first), read_report(options.second))
    if options.benchmark == "card":
        chosen = card.Card(backend=options.backend, dry=options.dry)
        return card.measure(chosen, only=options.only, seconds=options.seconds, out=options.out)
    measure = _COMPARED.get(options.benchmark)
    if measure is None:
        return _MEASURES[options.benchmark](options.repeats)
    given = {name: value for name, value in vars(options).items() if name != "benchmark"}
    if options.benchmark in ("quality", "image-noise", "theory"):
        del given["out"]  # is written when all is measured
    if options.benchmark == "quality":
        given["images"] = given.pop("pictures")
    return measure(**given)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="benchmark")
    for name, text in (
        ("prompt", "one prompt as a whole process, and its parts"),
        ("load", "from a checkpoint's file to the first step, and switching an adapter"),
        ("overhead", "what the loop itself costs a step, engines excluded"),
        ("watermark", "what a watermark withstands, and what it costs a picture"),
        ("batch", "`latentrt batch`, beside the pipeline in a loop"),
    ):
        added = commands.add_parser(name, help=text)
        added.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
        added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")
    for name, add, text in (
        ("latency", _add_latency, "a request and its parts, beside others'"),
        (
            "memory",
            partial(_add_modelled, repeats=2),
            "the memory of a request by stage, beside others'",
        ),
        ("build", _add_build, "tracing graphs and opening engines"),
        ("scale", _add_scale, "time against batch, size, steps and threads"),
        ("quality", _add_quality, "pictures beside those of float32"),
        (
            "bfloat16",
            partial(_add_modelled, repeats=5),
            "what float32 in places brings, beside bfloat16",
        ),
        (
            "processors",
            partial(_add_modelled, repeats=2),
            "backends on fewer instructions, and which is chosen",
        ),
        (
            "control",  # of the model that has the nets' graphs shipped
            partial(_add_modelled, repeats=3, model="sd15"),
            "what a ControlNet adds to a step, beside diffusers",
        ),
        ("tuning", _add_tuning, "seconds and memory of training a Stable Diffusion 1.5 on"),
    ):
        add(commands.add_parser(name, help=text))
    for name, pictures, text in (
        ("image-noise", 48, "noise that image-to-image removes, by its strength"),
        ("theory", 16, "schedules, the loss by noise level, and what guidance does"),
    ):
        _add_held_out(commands.add_parser(name, help=text), pictures)
    add_gpu(commands.add_parser("gpu", help="requests on an NVIDIA GPU, beside diffusers"))
    _add_serving(commands.add_parser("serving", help="batches under load, and a server's costs"))
    add_card(commands.add_parser("card", help="what one graphics card does, section by section"))
    agree = commands.add_parser("agree", help="whether two runs of latency say the same")
    agree.add_argument("first", type=Path, metavar="JSON")
    agree.add_argument("second", type=Path, metavar="JSON")
    agree.add_argument("--out", type=Path, metavar="JSON", help="also write the ratios here")
    commands.add_parser("report", help="make the tables and plots of the committed figures")
    return parser


def _add_latency(added: argparse.ArgumentParser) -> None:
    add_model(added, "sdturbo")
    add_only(added)
    added.add_argument(
        "--whole", action="store_true", help="run whole requests of sd15 instead of adding up parts"
    )
    add_compared(added, repeats=5)


def _add_modelled(added: argparse.ArgumentParser, repeats: int, model: str = "pictogram") -> None:
    add_model(added)
    added.set_defaults(model=model)
    add_only(added)
    add_compared(added, repeats)


def _add_serving(added: argparse.ArgumentParser) -> None:
    defaults = Choice(drawing=Drawing())
    drawing, add = defaults.drawing, added.add_argument
    add(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"the parts whose name holds this, of {', '.join(PARTS)}; may be given several times",
    )
    add(
        "--loads",
        default=",".join(map(str, defaults.loads)),
        metavar="LIST",
        help="of the capacity of one at a time, which is measured first (default: %(default)s)",
    )
    for option, text in (
        ("requests", "of a run under load"),
        ("arrivals", "of a simulated run"),
        ("memory", "requests to an engine that draws nothing, whose memory is looked at"),
    ):
        default = getattr(defaults, option)
        add(f"--{option}", type=int, default=default, help=f"{text} (default: %(default)s)")
    add("--rows", type=int, default=drawing.rows, help="in a step (default: %(default)s)")
    add("--threads", type=int, default=drawing.threads, help="(default: %(default)s)")
    add("--backend", choices=tuple(PRECISIONS), default=drawing.backend)
    add("--precision", choices=get_args(ComputePrecision), default=drawing.precision)
    add(
        "--clock",
        choices=CLOCKS,
        default=drawing.clock,
        help="of load and steps; the processor's, where others use the machine "
        "(default: %(default)s)",
    )
    add("--out", type=Path, metavar="JSON", help="write the figures here, or into those here")


def _serving_choice(options: argparse.Namespace) -> Choice:
    """Raises RequestError."""
    only: Sequence[str] = options.only or ("",)
    return Choice(
        drawing=Drawing(**{f.name: getattr(options, f.name) for f in fields(Drawing)}),
        parts=[part for part in PARTS if any(text in part for text in only)],
        loads=_numbers("--loads", options.loads),
        requests=options.requests,
        arrivals=options.arrivals,
        memory=options.memory,
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} is {text!r}; give numbers with commas between") from None


def _add_build(added: argparse.ArgumentParser) -> None:
    add_only(added)
    add_compared(added, repeats=3)


def _add_scale(added: argparse.ArgumentParser) -> None:
    add_model(added)
    for name, names, default in (
        ("backend", tuple(PRECISIONS), "cpu"),
        ("precision", get_args(ComputePrecision), "float32"),
    ):
        added.add_argument(
            f"--{name}", choices=names, default=default, help="(default: %(default)s)"
        )
    add_compared(added, repeats=3)


def _add_quality(added: argparse.ArgumentParser) -> None:
    added.add_argument("--pictures", type=int, default=20, help="(default: %(default)s)")
    added.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    added.add_argument(
        "--match",
        type=Path,
        nargs="?",
        const=Path("work/data.npz"),
        metavar="DATA",
        help="also the share of held-out pairs that are recognised, of the data set that "
        "`python -m training data` makes (default: %(const)s)",
    )
    added.add_argument(
        "--threads", type=int, help="of a setting (default: one for each processor core)"
    )
    added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")


def _add_held_out(added: argparse.ArgumentParser, pictures: int) -> None:
    added.add_argument(
        "--data",
        type=Path,
        default=Path("work/data.npz"),
        help="what `python -m training data` makes (default: %(default)s)",
    )
    added.add_argument("--pictures", type=int, default=pictures, help="(default: %(default)s)")
    added.add_argument("--threads", type=int, help="(default: one for each processor core)")
    added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")


def _add_tuning(added: argparse.ArgumentParser) -> None:
    added.add_argument("--steps", type=int, default=6, help="of a round (default: %(default)s)")
    added.add_argument(
        "--size", type=int, default=512, help="of pictures in pixels (default: %(default)s)"
    )
    add_only(added)
    add_compared(added, repeats=1)


if __name__ == "__main__":
    sys.exit(main())
