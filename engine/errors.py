"""What can go wrong, as a tree, and how a command ends by it.

LatentrtError
├── ModelError      a model folder, its configuration or its weights cannot be used
├── GraphError      a graph is missing, or does not fit the model that it is asked to run
├── BackendError    the library that runs engines is missing or failed
├── RequestError    an invalid request: size, steps, prompt, sampler, seed
└── OutputError     a result cannot be written where it was asked for

Every message is one sentence or two: what came, what is allowed, what to do.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import MappingProxyType

__all__ = [
    "BackendError",
    "GraphError",
    "LatentrtError",
    "ModelError",
    "OutputError",
    "RequestError",
    "choice",
    "exit_status",
    "first_line",
    "install",
    "libraries_of",
    "memory_hint",
    "nearest",
    "renamed",
    "said_of",
]

QUOTED = r"(?<!\w)(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`[^`]*`)(?!\w)"
FOR_MEMORY = re.compile(r"alloc|out of memory|not enough memory|insufficient memory", re.IGNORECASE)
USER_ERROR, INTERRUPTED = 2, 130  # what a shell is told
# What other programs call a choice.
FOREIGN_VALUES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("fp16", "f16", "half"), "float16"),
        **dict.fromkeys(("fp32", "f32", "full"), "float32"),
        **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
        **dict.fromkeys(("onnxruntime", "onnx", "ort"), "cpu"),
        **{"ov": "openvino", "trt": "tensorrt", "rtx": "tensorrt_rtx", "gpu": "cuda"},
        "jpeg": "jpg",
    }
)
OURS = frozenset({"benchmarks", "engine", "export", "latentrt", "runtime", "serving", "training"})


class LatentrtError(Exception):
    """The base of every error that this project raises on purpose."""


class ModelError(LatentrtError):
    """A model folder, its configuration or its weights cannot be used."""


class MissingTensorError(ModelError):
    """A checkpoint lacks a tensor that its kind of model has; to users a ModelError."""


class GraphError(LatentrtError):
    """A graph is missing, or does not fit the model that it is asked to run."""


class BackendError(LatentrtError):
    """The library that runs engines is missing or failed."""


class OutOfMemoryError(BackendError):
    """A device has not the memory that is wanted; to users a BackendError."""


class RequestError(LatentrtError, ValueError):
    """An invalid request: size, steps, prompt, sampler, seed."""


class OutputError(LatentrtError, OSError):
    """A result cannot be written where it was asked for."""


def first_line(error: Exception) -> str:
    """Make one line of what a library says, for the message of an error of ours."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def memory_hint(error: Exception) -> str:
    """Ask whether a picture is too large, after a library's error for want of memory; else ""."""
    wanted = isinstance(error, MemoryError) or FOR_MEMORY.search(str(error))
    return "; is the picture too large for the memory of this machine?" if wanted else ""


def nearest(value: object, known: Iterable[object], cutoff: float = 0.6) -> str:
    """Return the name that is nearest to a wrong one, whatever their case; "" for none.

    It is the one that another program calls so, or else one that is written alike.
    """
    names = {str(name).lower(): str(name) for name in known}
    word = str(value)[:200].lower()
    if FOREIGN_VALUES.get(word) in names:
        return names[FOREIGN_VALUES[word]]
    close = difflib.get_close_matches(word, names, 1, cutoff)
    return names[close[0]] if close else ""


def choice(value: object, known: Iterable[object], *, or_else: str = "") -> str:
    """Say what to give in the place of a wrong name, the one that is near first.

    or_else: what may be given beside the known ones, such as ", or an ONNX file"
    """
    names = [str(name) for name in known]
    near, listed = nearest(value, names), f"{', '.join(names)}{or_else}"
    return f"did you mean {near!r}? There are {listed}" if near else f"choose one of {listed}"


def renamed(message: str, names: Mapping[str, str]) -> str:
    """Return a sentence of ours with other names of fields: a command's options, an API's fields.

    names: what a field is called there, by its own name. One word may be a noun as well, so it is
    taken for a field only where our sentences speak of one: at their start, behind "without". What
    stands in quotes came from a user and stays.
    """
    words = sorted((re.escape(name) for name in names if len(name) > 1), key=len, reverse=True)
    sure, doubtful = (
        "|".join(word for word in words if ("_" in word or "." in word) is several) or "(?!)"
        for several in (True, False)
    )
    found = re.compile(
        rf"{QUOTED}|(?<![\w./-])(?P<sure>{sure})(?![\w-]|[./]\w)"
        rf"|(?:^|(?<=without )|(?<=leave )|(?<=and )|(?<=but ))(?P<word>{doubtful})"
        r"(?=$|'s |[;,] | (?:is|has|came|names|and|or|out|of|runs|takes)\b| [\d'])"
    )

    def other(match: re.Match[str]) -> str:
        name = match["sure"] or match["word"]
        return names[name] if name else match[0]

    return found.sub(other, message)


def install(packages: str, extra: str) -> str:
    """Say how to install what is missing: its packages, or this project's extra in a clone."""
    clone = f"in a clone of Latentrt `pip install '.[{extra}]'`"
    return f"install it with `pip install {packages}` ({clone})"


@contextmanager
def libraries_of(extra: str) -> Iterator[None]:
    """Raise BackendError where a library of one of this project's extras is missing within."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if not library or library in OURS:
            raise
        raise BackendError(
            f"this needs {library}, which is not installed; `pip install '.[{extra}]'` in a clone "
            "of Latentrt installs all that it needs"
        ) from error


def exit_status(
    command: Callable[[], int | None],
    *,
    cancelled: str = "cancelled",
    wording: Callable[[str], str] = str,
) -> int:
    """Run a command; return its exit status, 2 for an error of ours and 130 for Ctrl-C.

    command: returns its status, None being 0
    cancelled: what to tell after Ctrl-C
    wording: puts an error's sentence into the words of the command

    Where the output's encoding lacks a character, as that of Windows' pipes does, it is written as
    an escape, and nothing ends in an error of encoding. Where nobody reads the output any more, the
    command ends without a word, as if it had been read.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except LatentrtError as error:
        _tell(f"error: {wording(str(error))}")
        return USER_ERROR
    except KeyboardInterrupt:
        _tell(f"\n{cancelled}")
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the last flush would fail too
        return 0
    except OSError as error:
        _tell(f"error: {said_of(error)}")
        return USER_ERROR


def said_of(error: OSError) -> str:
    """Say in a sentence which file failed; raises an error again that names none, a fault of ours.

    A file may be closed to us, or go while it is used, wherever one is opened.
    """
    if error.filename is None:
        raise error
    return (
        f"{error.filename} cannot be used ({error.strerror}); check its permissions, or give "
        "another"
    )


def _tell(text: str) -> None:
    """Write to the standard error, if there is one and somebody reads it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr)
