"""A report that is written after every measurement, so that a second call goes on with it."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.worker import ContenderError
from engine.errors import OutputError, RequestError
from engine.store.cache import write_atomically

PACKAGES = (
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "onnx",
    "onnxscript",
    "diffusers",
    "transformers",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "stable-diffusion-cpp-python",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "cuda-core",
    "cuda-bindings",
)


def named(kind: str, names: Collection[str], only: Sequence[str]) -> list[str]:
    """Return the names that hold one of these texts, all where there is none.

    kind: what the names are of, for the error. Raises RequestError when no name is left.
    """
    found = [name for name in names if not only or any(text in name for text in only)]
    if not found:
        raise RequestError(f"no {kind} is called {' or '.join(only)}; there are {'; '.join(names)}")
    return found


def begin(
    request: Mapping[str, Any], out: Path | None, fresh: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the report that a former call left in a file, or one without figures.

    request: what is measured, as JSON's values; fresh: gives the rest of a new report
    Raises OutputError when the file holds figures of another request or machine.
    """
    machine = describe()
    if out is not None and out.is_file():
        former = read_report(out)
        same = all(former["machine"][key] == machine[key] for key in ("processor", "cores"))
        if former["request"] != request or not same:
            raise OutputError(
                f"{out} holds figures of another request or machine; give another file, or "
                "delete it"
            )
        return former
    return {
        "machine": {**machine, "load_average": round(os.getloadavg()[0], 2)},
        "versions": versions(),
        "request": dict(request),
        **fresh(),
    }


def keep(report: Mapping[str, Any], out: Path | None) -> None:
    """Write a report to its file, if it has one."""
    if out is not None:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(out, lambda file: file.write(text.encode()))


def fill(
    taken: dict[str, Any],
    names: Collection[str],
    repeats: int,
    take: Callable[[str], dict[str, Any]],
    written: Callable[[], None],
) -> None:
    """Measure in turn until each name has its rounds; what could not be measured is tried again.

    taken: of each name its `rounds`, and as `skipped` why there are no more
    take: measures once, and raises ContenderError; written: is called after each
    """
    for name in names:
        taken.setdefault(name, {"rounds": []}).pop("skipped", None)
    for number in range(1, repeats + 1):
        for name in names:
            if len(taken[name]["rounds"]) >= number or "skipped" in taken[name]:
                continue
            try:
                taken[name]["rounds"].append(take(name))
            except ContenderError as failure:
                taken[name]["skipped"] = str(failure)
            written()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_report(path: Path) -> dict[str, Any]:
    """Read a report; raises OutputError when the file is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        report["machine"]["processor"], report["machine"]["cores"], report["request"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{path} is no benchmark's report ({type(error).__name__}: {error}); give another "
            "file, or delete it"
        ) from error
    return report
