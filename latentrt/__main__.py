"""The command `latentrt`: a subcommand where the first word is one, else a prompt to draw.

latentrt "a red apple"     is short for     latentrt draw "a red apple"
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import MappingProxyType

from engine.errors import RequestError, exit_status, nearest
from latentrt import stranger

DRAW = "draw"
# What other programs call subcommands.
OTHERS = {**dict.fromkeys(("txt2img", "img2img", "generate", "run", "sample"), DRAW)}
OTHERS |= {"xyz": "grid", "convert": "export", "server": "serve", "enlarge": "upscale"}


@dataclass(frozen=True, slots=True)
class Subcommand:
    """A subcommand: the module whose `main(arguments, prog)` runs it, and a line for the help."""

    module: str
    help: str


# Whatever comes later registers here.
SUBCOMMANDS: Mapping[str, Subcommand] = MappingProxyType(
    {
        DRAW: Subcommand("runtime.__main__", "draw pictures from a prompt"),
        "grid": Subcommand("runtime.grid", "draw pictures over two or three options on a sheet"),
        "batch": Subcommand("runtime.batch.__main__", "draw the requests of a file, resumably"),
        "upscale": Subcommand("runtime.upscale", "enlarge a picture with a trained upscaler"),
        "preprocess": Subcommand("runtime.preprocess", "make the hint of a control from a picture"),
        "export": Subcommand("export.__main__", "trace graphs, build engines, tend the cache"),
        "info": Subcommand("latentrt.info", "say what a checkpoint, an adapter or a picture is"),
        "calibrate": Subcommand("runtime.calibration", "find the ranges that int8 needs, once"),
        "serve": Subcommand("serving.__main__", "serve pictures over HTTP"),
        "bench": Subcommand("benchmarks.__main__", "measure, beside peers"),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given in (["-h"], ["--help"], ["help"]):
        return exit_status(lambda: print(usage()))
    if given in (["-V"], ["--version"], ["version"]):
        return exit_status(lambda: print(f"latentrt {_version()}"))
    if given[0] in SUBCOMMANDS:
        name, given = given[0], given[1:]
        if said := stranger(SUBCOMMANDS[name].module.partition(".")[0]):
            return exit_status(partial(_refuse, said))
        return _run(name)(given, f"latentrt {name}")
    if meant := _meant(*given):
        said = f"{given[0]} is no subcommand; did you mean `latentrt {meant}`?"
        return exit_status(partial(_refuse, said))
    return _run(DRAW)(given, "latentrt")


def _refuse(said: str) -> None:
    raise RequestError(said)


def _meant(first: str, *rest: str) -> str:
    """Return the subcommand that the first of several words stands for; "" where it is a prompt."""
    if " " in first or first.startswith("-") or not rest or rest[0].startswith("-"):
        return ""
    return OTHERS.get(first) or nearest(first, SUBCOMMANDS, cutoff=0.8)


def _version() -> str:
    from runtime.images.files import program_version  # which a usage needs not

    return program_version()


def usage() -> str:
    """Return the help: every subcommand with its line."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {each.help}" for name, each in SUBCOMMANDS.items()]
    return "\n".join(
        (
            'usage: latentrt "a red apple, fluent style" -o apple.png',
            "       latentrt SUBCOMMAND ...",
            "",
            *lines,
            "",
            f"`latentrt SUBCOMMAND --help` lists the options; those of {DRAW} need no subcommand.",
        )
    )


def _run(name: str) -> Callable[[Sequence[str], str], int]:
    main: Callable[[Sequence[str], str], int] = import_module(SUBCOMMANDS[name].module).main
    return main


if __name__ == "__main__":
    sys.exit(main())
