"""An engine that remembers how large the inputs of its layers became, for int8."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Ranges
from engine.backends.openvino.engine import OpenVinoEngine
from engine.backends.openvino.layers import MAX, MIN, add_observers


class ObservingEngine(OpenVinoEngine):
    """Runs as any other; `ranges` are those of all runs so far."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature, and keep what the observers saw to itself."""
        outputs = super().run(inputs)
        for title, further in ((MIN, np.minimum), (MAX, np.maximum)):
            for name in [name for name in outputs if name.startswith(title)]:
                seen = outputs.pop(name)
                self._seen[name] = further(seen, self._seen.get(name, seen))
        return outputs

    @property
    def ranges(self) -> Ranges:
        """The smallest and the largest input of each layer, by its weight's name."""
        names = [name.removeprefix(MIN) for name in self._seen if name.startswith(MIN)]
        return {
            name: (float(self._seen[MIN + name]), float(self._seen[MAX + name])) for name in names
        }

    def _prepare(self, model: Any) -> None:
        add_observers(self._library, model, self._graph.weights)
        self._seen: dict[str, NDArray[Any]] = {}
