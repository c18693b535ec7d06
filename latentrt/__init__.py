"""Everything public of Latentrt in one import: `from latentrt import Pipeline, Request`."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING


def stranger(*packages: str) -> str:
    """Say what is found in place of one of our packages; "" where all are ours. Runs nothing."""
    for package in packages:
        found = find_spec(package)
        where = "" if found is None else found.origin or ""
        if where and Path(where).resolve().parent.parent != Path(__file__).resolve().parent.parent:
            return (
                f"{where} is found in place of Latentrt's package `{package}`; rename it, run the "
                "command from another folder, or use the command `latentrt`"
            )
    return ""


# A folder or a file of this name may stand where Python looks first, such as the working folder.
if _message := stranger("engine", "runtime"):
    if sys.argv[:1] == ["-m"]:  # `python -m latentrt`, which would print a traceback
        print(f"error: {_message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_message)

if TYPE_CHECKING:
    from latentrt.public import *  # noqa: F403
else:
    from engine.deferred import deferred

    __getattr__ = deferred(__name__)
