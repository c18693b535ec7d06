"""A model with its engines: opened when they are first needed, with adapters on or off."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.adapters.adapter import Adapted, AdapterChoice, adapt, parse_adapter, read_adapter
from engine.backends.base import Arrays, Engine
from engine.checkpoints.component import Component, ComponentName
from engine.errors import BackendError, ModelError
from engine.graphs.signature import Part
from engine.model import COMPONENTS, Model


class LoadedModel:
    """The engines of a model's parts, each opened once; `open_part` binds weights to a graph."""

    def __init__(self, model: Model, open_part: Callable[[Part, Arrays], Engine]) -> None:
        self.model = model
        self.engines: dict[Part, Engine] = {}
        self._open_part = open_part
        self._adapted: dict[ComponentName, Adapted] = {}

    def engine(self, part: Part) -> Engine:
        """Return a part's engine, opening it at the first call.

        Raises ModelError, GraphError or BackendError.
        """
        if part not in self.engines:
            name = COMPONENTS[part]
            self.model.config(part)  # says what to give where the model has no such part
            found = self.model.find(name)
            with self._naming_the_model():
                self.engines[part] = self._open_part(part, self._adapted.get(name) or found)
            found.weights.release()
        return self.engines[part]

    def set_loras(self, loras: Sequence[str | Path | AdapterChoice]) -> None:
        """Put these adapters on in place of those that are on; see `runtime.Pipeline`."""
        if not loras and not self._adapted:
            return
        bases = {name: self.model.find(name) for name in _adaptable(self.model)}
        self._rebind(_adapt(bases, loras))
        for base in bases.values():
            base.weights.release()

    def _rebind(self, adapted: dict[ComponentName, Adapted]) -> None:
        """Hand the weights that differ to the open engines: to all of them or, failing, to none."""
        before, changed = self._adapted, []
        try:
            for part, engine in self.engines.items():
                if (name := COMPONENTS[part]) in adapted:
                    old = before.get(name)
                    touched = adapted[name].touched | (old.touched if old else frozenset())
                    changed.append((engine, old or adapted[name].base, touched))
                    with self._naming_the_model():
                        engine.rebind(adapted[name], touched)
        except BaseException:
            for engine, former, touched in changed:
                engine.rebind(former, touched)
            raise
        self._adapted = adapted

    @contextmanager
    def _naming_the_model(self) -> Iterator[None]:
        """Say whose weights an engine refuses; it sees arrays and no files."""
        try:
            yield
        except (BackendError, ModelError) as error:
            raise type(error)(f"{self.model.path}: {error}") from error


def adapted_weights(
    model: Model, loras: Sequence[str | Path | AdapterChoice]
) -> dict[ComponentName, Adapted]:
    """Return the weights of the components that adapters may change, with these on.

    Raises ModelError when one does not fit.
    """
    return _adapt({name: model.find(name) for name in _adaptable(model)}, loras)


def _adaptable(model: Model) -> set[ComponentName]:
    return {*model.configs} - {"vae", "preview_decoder"}


def _adapt(
    bases: Mapping[ComponentName, Component], loras: Sequence[str | Path | AdapterChoice]
) -> dict[ComponentName, Adapted]:
    choices = [
        lora if isinstance(lora, AdapterChoice) else parse_adapter(str(lora)) for lora in loras
    ]
    adapters = [(read_adapter(choice.path), choice) for choice in choices]
    return adapt(bases, {name: base.shapes for name, base in bases.items()}, adapters)
