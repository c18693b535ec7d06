"""Names of models and adapters, which requests and metrics bear."""

import re
from collections.abc import Sequence

from engine.errors import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_names(names: Sequence[str]) -> None:
    """Refuse names that a request or a metric could not bear. Raises RequestError."""
    for name in names:
        if not NAME.fullmatch(name):
            raise RequestError(
                f"{name!r} is no name for a model or an adapter; take letters, digits, '.', '-' "
                "and '_', up to 100"
            )
