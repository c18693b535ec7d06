"""What a pickle's names become when they are not imported: names, and objects nobody can use."""

import re
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = [
    "SYSTEM",
    "Name",
    "Opaque",
    "RefusalError",
    "UnfitError",
    "objection",
    "refusal_at",
    "refused",
]

# The types of torch's elements, of which the calls know those that numpy has.
TORCH_TYPE = re.compile(r"torch\.(\w+Storage|(b?float|complex|q?u?int|bits)\d\w*)")
# By these a pickle reaches the system; no checkpoint needs one, wherever it stands.
SYSTEM = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|pty|ctypes|importlib|runpy|code|marshal|_?pickle|"
    r"commands|webbrowser|urllib|http|requests|asyncio|multiprocessing|threading)(\.\w+)+|"
    r"(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|input|breakpoint|__import__)"
)


class UnfitError(Exception):
    """The arguments of a call, or the state of an object, are not what its name needs."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names, by its module and name; never imported."""

    text: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """A name that is not known, or an object that it would have made; nothing was made or run.

    text: the name; position: where it stands in the pickle, in bytes
    """

    text: str
    position: int


class RefusalError(Exception):
    """What a pickle does, and why that is refused."""


def refused(path: Path, value: Opaque) -> ModelError:
    """Say that an object stands where only data can be used, for the caller to raise."""
    return refusal_at(path, RefusalError(*objection(value.text)), value.position)


def objection(text: str) -> tuple[str, str]:
    """Say what a pickle does with a name that is not known, and why that is refused."""
    if TORCH_TYPE.fullmatch(text):
        return f"holds values of {short(text)[1:-1]}", "these are not read"
    return f"names {short(text)[1:-1]}", "it could run code"


def refusal_at(path: Path, refusal: RefusalError, position: int) -> ModelError:
    """Say what a file's pickle does and where, for the caller to raise."""
    does, why = refusal.args
    return ModelError(
        f"{path} is refused: its pickle {does} at byte {position}, and {why}; only tensors, "
        "dictionaries, lists, numbers and texts are read: take the model as .safetensors"
    )
