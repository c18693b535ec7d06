"""Packages whose public names are imported when the first of them is asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def deferred(package: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which finds the names of its module `public`.

    A command that needs one room of the package does not wait for the others. What is returned
    raises AttributeError for other names.
    """

    def find(name: str) -> Any:
        if name != "__all__" and name.startswith("__"):  # as the import system asks for
            raise AttributeError(name)
        public = import_module(f"{package}.public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(public, name)

    return find
