"""Doubles that take what the real class takes, and nothing else.

`strict(real, fake)` is `fake` seen through the installed library's class `real`: an attribute that
the class has not is an AttributeError, and a call that its signature refuses a TypeError. Classes
of pybind11 state their signatures in their docstrings, those of Cython as Python's do.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

LINE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> .+$", re.MULTILINE)


class Strict:
    """See `strict`."""

    __slots__ = ("__weakref__", "_fake", "_real")

    def __init__(self, real: Any, fake: Any) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_fake", fake)

    def __getattr__(self, name: str) -> Any:
        offered, found = getattr(self._real, name), getattr(self._fake, name)
        if not callable(offered) or isinstance(offered, type):
            return found
        return checked(offered, found, of_class=isinstance(self._real, type))

    def __setattr__(self, name: str, value: Any) -> None:
        getattr(self._real, name)
        setattr(self._fake, name, value)


def strict(real: Any, fake: Any) -> Any:
    """Return a double of an object of the class `real`, or of the module `real`."""
    return Strict(real, fake)


def unwrapped(double: Any) -> Any:
    """Return what a double was made from."""
    return object.__getattribute__(double, "_fake")


def checked(real: Any, fake: Callable[..., Any], of_class: bool = False) -> Callable[..., Any]:
    """Return `fake` behind the signature of the function or class `real`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        check_call(real, args, kwargs, of_class)
        return fake(*args, **kwargs)

    return call


def check_call(real: Any, args: tuple[Any, ...], kwargs: Any, of_class: bool = False) -> None:
    """Raise TypeError where no overload of `real` takes these arguments."""
    found = list(signatures(real))
    assert found, f"{real} does not say what it takes"
    for signature in found:
        itself = (None,) if of_class and next(iter(signature.parameters), "") == "self" else ()
        try:
            bound = signature.bind(*itself, *args, **kwargs).arguments
        except TypeError:
            continue
        bound.pop("self", None)
        kinds = {name: signature.parameters[name].annotation for name in bound}
        if all(_fits(value, kinds[name]) for name, value in bound.items()):
            return
    name = getattr(real, "__name__", real)
    raise TypeError(f"{name} takes {' or '.join(map(str, found))}, not {args} {kwargs}")


def signatures(real: Any) -> Iterator[inspect.Signature]:
    """Read what a function takes, each overload once."""
    documented = real.__init__ if isinstance(real, type) else real
    stated = [line for line in LINE.findall(documented.__doc__ or "") if "*args" not in line[1]]
    if stated and type(documented).__name__ == "instancemethod":
        for _, arguments in stated:
            yield inspect.Signature([*_parameters(arguments)])
    else:
        try:
            yield inspect.signature(real)
        except ValueError:  # a class of Cython, whose docstring begins with its signature
            first = LINE.match(real.__doc__)
            yield inspect.Signature([*_parameters(first[2])] if first else [])


def _parameters(arguments: str) -> Iterator[inspect.Parameter]:
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for argument in re.split(r", (?![^\[(<]*[\])>])", arguments):
        if argument == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif argument and argument != "/":
            stated, _, default = argument.partition(" = ")
            name, _, annotation = stated.partition(": ")
            given = default or inspect.Parameter.empty
            yield inspect.Parameter(name, kind, default=given, annotation=annotation or "object")


def _fits(value: Any, annotation: Any) -> bool:
    if not isinstance(annotation, str):
        return True
    return any(_is(value, name.strip(" '").split(".")[-1]) for name in annotation.split("|"))


def _is(value: Any, name: str) -> bool:
    if name in ("SupportsInt", "int", "size_t"):
        return hasattr(value, "__index__") or hasattr(value, "__int__")
    if name == "Buffer" and not isinstance(value, Strict):
        try:
            return bool(memoryview(value).nbytes)
        except TypeError:
            return False
    known = {
        "str": str,
        "bool": bool,
        "tuple": tuple,
        "list": list,
        "ndarray": np.ndarray,
        "None": type(None),
    }
    if name in known:
        return isinstance(value, known[name])
    if not name[:1].isupper() or "[" in name:  # object, a container: anything
        return True
    kind = object.__getattribute__(value, "_real") if isinstance(value, Strict) else type(value)
    return name in {parent.__name__ for parent in inspect.getmro(kind)}
