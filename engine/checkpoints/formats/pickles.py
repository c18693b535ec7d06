"""Pickles read as data: a machine of our own for pickle's instructions, which runs nothing.

Python's own unpickler imports and calls what a file names. Here a name is a text that is looked up
in a table of the few that checkpoints need, and "calling" it makes one of our plain values. What
any other name would have made is an `Opaque` value: settings of a training may hold such, and what
needs a tensor there refuses it. A name by which only an attack would reach the system ends the
reading, as unknown instructions do. What it costs is bounded by the number of instructions:
the memo is a dictionary, so an index of 2**31 takes no memory, and keys of dictionaries are texts,
whose hashes nobody can make collide. https://docs.python.org/3/library/pickletools.html
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickletools import genops
from typing import IO, Any, TypeAlias

from engine.checkpoints.formats.pickle_values import (
    SYSTEM,
    Name,
    Opaque,
    RefusalError,
    UnfitError,
    objection,
    refusal_at,
)
from engine.checkpoints.formats.tensors import damaged, is_unicode, short

__all__ = ["Call", "Name", "UnfitError", "read_pickle"]

MAX_INSTRUCTIONS = 2_000_000  # 40 a tensor; a training checkpoint of SD 1.5 has 250,000
MAX_INTEGER = 2**256  # random generators keep numbers of 128 bits

MAX_ARGUMENTS = 16
Call: TypeAlias = Callable[..., Any]


@dataclass(slots=True, kw_only=True)
class _Machine:
    """The state that pickle's instructions work on.

    calls: what the known names make of their arguments; None: a name that nothing may call
    load: makes a storage of a persistent id
    marks: the stacks below the marks that are still open
    """

    calls: Mapping[str, Call | None]
    load: Call
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    position: int = 0

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, text: str) -> Name | Opaque:
        """Look a name up; one that reaches the system is refused here."""
        if text in self.calls:
            return Name(text)
        if SYSTEM.fullmatch(text):
            raise RefusalError(*objection(text))
        return Opaque(text, self.position)

    def call(self, callee: Any, arguments: Any) -> Any:
        """Make the value that a known name stands for; of what is opaque comes what is opaque."""
        if isinstance(callee, Opaque):
            return callee
        made = self.calls[callee.text] if isinstance(callee, Name) else None
        if made is None:
            what = callee.text if isinstance(callee, Name) else f"a {type(callee).__name__}"
            raise RefusalError(f"calls {what}", "it could run code")
        if not isinstance(arguments, tuple):
            raise UnfitError(f"arguments that are a {type(arguments).__name__}")
        if len(arguments) > MAX_ARGUMENTS:
            raise UnfitError(f"{len(arguments)} arguments")
        unknown = next((each for each in arguments if isinstance(each, Opaque)), None)
        value = unknown or made(*arguments)
        return replace(value, position=self.position) if isinstance(value, Opaque) else value


def read_pickle(
    path: Path, pickle: bytes | IO[bytes], calls: Mapping[str, Call | None], load: Call
) -> Any:
    """Read a pickle: None, truth values, numbers, texts, bytes, lists, tuples and dictionaries.

    pickle: or what it is read from, which is left where it ends
    calls: by name ("collections.OrderedDict"), what makes a value of a call's arguments; it raises
        UnfitError when they are wrong. None stands for a name that may be there but not be called.
    load: makes a value of a persistent id, which is where torch puts its storages; the same errors
    Sets become lists; keys of dictionaries become texts. Values may share others, and hold
    themselves. Objects of unknown names are `Opaque`. Raises ModelError, RefusalError as
    well, with the byte, for anything else.
    """
    machine = _Machine(calls=calls, load=load)
    position = 0
    try:
        for count, (instruction, argument, at) in enumerate(genops(pickle)):
            machine.position = position = at or 0
            if count == MAX_INSTRUCTIONS:
                raise UnfitError(f"more than {MAX_INSTRUCTIONS} instructions")
            name = instruction.name
            if name in VALUES:
                machine.stack.append(_checked(argument))
            elif name in HANDLERS:
                HANDLERS[name](machine, argument)
            elif name == "INST":
                machine.name(str(argument).replace(" ", "."))
                raise RefusalError("holds an instruction INST", "it could run code")
            elif name not in IGNORED:
                raise RefusalError(f"holds an instruction {name}", "it could run code")
        if machine.marks or len(machine.stack) != 1:
            raise UnfitError("values that belong to nothing")
    except RefusalError as refusal:
        raise refusal_at(path, refusal, position) from None
    except UnfitError as problem:
        raise damaged(path, f"its pickle has {problem} at byte {position}") from None
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its pickle cannot be read at byte {position}") from error
    return machine.stack[0]


def _checked(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UnfitError("a number of more than 256 bits")
    if isinstance(value, str) and not is_unicode(value):
        raise UnfitError(f"a text {short(value)}, which is no valid Unicode,")
    return value


def _key(value: Any) -> str:
    """Make a text of a dictionary's key."""
    if isinstance(value, str):
        return value
    if isinstance(value, (Name, Opaque)):
        return value.text
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    raise UnfitError(f"a key that is a {type(value).__name__}")


def _fill(target: Any, items: list[Any]) -> None:
    """Put keys and values, by turns, into a dictionary."""
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise UnfitError(f"pairs for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        name = _key(key)
        if name in target and isinstance(key, Opaque):
            name = f"{name} {len(target)}"  # members of one enumeration, say
        if name in target:
            raise UnfitError(f"{short(name)} twice in a dictionary")
        target[name] = value


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, Opaque):
        return
    if not isinstance(target, list):
        raise UnfitError(f"items for a {type(target).__name__}")
    target.extend(items)


def _put_memo(machine: _Machine, index: Any) -> None:
    machine.memo[index] = machine.stack[-1]


def _get_memo(machine: _Machine, index: Any) -> None:
    machine.stack.append(machine.memo[index])


def _memoize(machine: _Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.pop_mark()


def _duplicate(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.stack[-1])


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _tuple(size: int) -> Callable[[_Machine, Any], None]:
    def handle(machine: _Machine, _: Any) -> None:
        items = tuple(machine.stack.pop() for _ in range(size))
        machine.stack.append(items[::-1])

    return handle


def _marked(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    def handle(machine: _Machine, _: Any) -> None:
        items = machine.pop_mark()
        machine.stack.append(make(items))

    return handle


def _dictionary(items: list[Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    _fill(made, items)
    return made


def _append(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    _extend(machine.stack[-1], items)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    _fill(machine.stack[-1], items)


def _global(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.name(argument.replace(" ", ".")))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise UnfitError("a name that is no text")
    machine.stack.append(machine.name(f"{module}.{name}"))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, callee = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(callee, arguments))


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, Opaque):
        return
    if not hasattr(target, "set_state"):
        what = target.text if isinstance(target, Name) else f"a {type(target).__name__}"
        raise RefusalError(f"changes {what}", "it could run code")
    target.set_state(state)


def _load(machine: _Machine, _: Any) -> None:
    key = machine.stack.pop()
    of = key[1:2] if isinstance(key, tuple) else ()  # the type of the storage's elements
    machine.stack.append(of[0] if of and isinstance(of[0], Opaque) else machine.load(key))


# Instructions whose argument is the value itself, those that say nothing, and the others.
VALUES = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    ]
)
IGNORED = frozenset(["PROTO", "FRAME", "STOP"])
HANDLERS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_DICT": _push(dict),
    "EMPTY_LIST": _push(list),
    "EMPTY_SET": _push(list),
    "EMPTY_TUPLE": _push(tuple),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": _marked(tuple),
    "LIST": _marked(list),
    "FROZENSET": _marked(list),
    "DICT": _marked(_dictionary),
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": _duplicate,
    "MEMOIZE": _memoize,
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], _put_memo),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], _get_memo),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": _load,
}
