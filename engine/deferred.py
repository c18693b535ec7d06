"""Packages whose public names are imported one by one, when each is first asked for."""

import ast
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


def deferred(package: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which finds the names of its module `public`.

    Who needs one room of the package does not wait for the others. What is returned raises
    AttributeError for other names.
    """

    def find(name: str) -> Any:
        if name == "__all__":
            return sorted(_origins(package))
        origin = None if name.startswith("__") else _origins(package).get(name)
        if origin is None:  # two underscores: as the import system asks
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(origin), name)

    return find


@cache
def _origins(package: str) -> dict[str, str]:
    """Return the module of each public name, as `public` imports them, without importing any."""
    source = pkgutil.get_data(package, "public.py") or b""
    imports = (node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom))
    return {name.name: node.module or "" for node in imports for name in node.names}
