"""Options that several benchmarks have, and those of a graphics card."""

import argparse
from pathlib import Path

from benchmarks import gpu
from benchmarks.scenarios import SCENARIOS
from engine.backends.settings import ON_GPU


def add_compared(added: argparse.ArgumentParser, repeats: int) -> None:
    """Add the options of a benchmark of several things, whose figures are added to a file."""
    added.add_argument("--repeats", type=int, default=repeats, help="rounds (default: %(default)s)")
    added.add_argument("--threads", type=int, help="at most (default: one for each processor core)")
    added.add_argument(
        "--out", type=Path, metavar="JSON", help="write the figures here, or go on with those here"
    )


def add_model(added: argparse.ArgumentParser, *more: str) -> None:
    """Add the option of the model; more: that this benchmark knows beside the scenarios."""
    added.add_argument(
        "--model",
        default="pictogram",
        choices=(*SCENARIOS, *more),
        help="the model that ships, or random weights of a published model's size "
        "(default: %(default)s)",
    )


def add_only(added: argparse.ArgumentParser) -> None:
    """Add the option that chooses by name."""
    added.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="those whose name holds this, and no others; may be given several times",
    )


def add_gpu(added: argparse.ArgumentParser) -> None:
    """Add the options of `benchmarks.gpu`."""
    add_only(added)
    added.add_argument(
        "--scenarios",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"those whose name holds this, of {', '.join(gpu.SCENARIOS)}; may be given several "
        "times",
    )
    added.add_argument(
        "--minutes", type=float, help="stop after so many; the same command then goes on"
    )
    added.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    added.add_argument(
        "--out", type=Path, metavar="JSON", help="write the figures here, or go on with those here"
    )


def add_card(added: argparse.ArgumentParser) -> None:
    """Add the options of `benchmarks.card`."""
    add_only(added)
    added.add_argument(
        "--backend", choices=ON_GPU, default="cuda", help="of the card (default: %(default)s)"
    )
    added.add_argument(
        "--seconds", type=float, help="for all sections; the same command then goes on"
    )
    added.add_argument("--dry", action="store_true", help="the smallest form of every section")
    added.add_argument(
        "--out", type=Path, metavar="JSON", help="write the figures here, or go on with those here"
    )
