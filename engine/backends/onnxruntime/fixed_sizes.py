"""Sessions for inputs of fixed shapes, one for each form that a graph's inputs take.

The sizes of a graph are symbols. Where they are open, ONNX Runtime computes with them in every run,
on the processor and with copies to and fro beside a GPU, and a graph that waits for such copies
cannot be recorded. Fixed when the session is opened, they are folded away.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from engine.devices.device import Shape
from engine.errors import BackendError
from engine.graphs.onnx_bytes import input_shapes

Session = TypeVar("Session")
Sizes = Mapping[str, int]
"""What each symbol of a graph stands for."""
LIMIT = 8  # forms whose sessions are kept


class FormSessions(Generic[Session]):
    """The sessions of one graph, by the shapes of its inputs; the least recently used go first.

    data: the graph, a serialised ModelProto
    open_session: opens what stands for a session, with these sizes fixed (`fix_sizes`)
    limit: how many are kept
    """

    def __init__(
        self, data: bytes, open_session: Callable[[Sizes], Session], limit: int = LIMIT
    ) -> None:
        self._stated = input_shapes(data)
        self._open = open_session
        self._limit = limit
        self._sessions: OrderedDict[frozenset[tuple[str, Shape]], Session] = OrderedDict()

    def get(self, inputs: Mapping[str, Shape]) -> Session:
        """Return the session for inputs of these shapes, opening it at the first call.

        Raises BackendError where they are none of the graph's, and what `open_session` raises.
        """
        form = frozenset((name, tuple(shape)) for name, shape in inputs.items())
        if form not in self._sessions:
            sizes = sizes_of(self._stated, inputs)
            while len(self._sessions) >= self._limit:
                self._sessions.popitem(last=False)  # its memory goes before the next comes
            self._sessions[form] = self._open(sizes)
        self._sessions.move_to_end(form)
        return self._sessions[form]

    def opened(self) -> Collection[Session]:
        """Return the sessions that are kept."""
        return self._sessions.values()

    def clear(self) -> None:
        """Let go of all sessions."""
        self._sessions.clear()


def sizes_of(
    stated: Mapping[str, tuple[int | str, ...]], inputs: Mapping[str, Shape]
) -> dict[str, int]:
    """Find what the symbols in the stated shapes of inputs stand for, from their actual shapes.

    Raises BackendError where the shapes do not fit the stated ones or each other.
    """
    sizes: dict[str, int] = {}
    for name, shape in inputs.items():
        symbols = stated.get(name, ())
        if len(symbols) != len(shape) or any(
            size != (symbol if isinstance(symbol, int) else sizes.setdefault(symbol, size))
            for symbol, size in zip(symbols, shape, strict=False)
        ):
            wanted = ", ".join(f"{s} = {sizes[s]}" if s in sizes else f"{s}" for s in symbols)
            raise BackendError(
                f"the input {name!r} has the shape {tuple(shape)}, and its graph takes ({wanted})"
            )
    return sizes


def fix_sizes(options: Any, sizes: Sizes) -> None:
    """Have a session that is opened with these SessionOptions take inputs of these sizes alone."""
    for symbol, size in sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
