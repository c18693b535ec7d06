"""What adapters add to the tensors of a model, computed for one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.adapters.lora import Change, Factor, decompose
from engine.checkpoints.formats.files import release
from engine.checkpoints.formats.tensors import add_into
from engine.errors import ModelError

__all__ = ["Adapted", "Update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an adapter adds to one tensor of a model.

    source: the module and the file, for messages
    magnitude: DoRA's norms
    """

    source: str
    change: Change
    scale: float = 1.0
    magnitude: Factor | None = None

    def delta(self, base: NDArray[Any], weight: float = 1.0) -> NDArray[np.float32]:
        """Compute what is added to `base`, as a new float32 array of its shape.

        DoRA with a weight is that part of the way from the base to what was trained.
        Raises ModelError when the result is not finite.
        """
        with np.errstate(all="ignore"):  # what overflows is found by the norm, in one pass
            if self.magnitude is None:
                delta = self._finite(self.change.matrix(self.scale * weight))
            else:
                delta = self._finite(self.change.matrix(self.scale))
                delta = decompose(base, delta, self.magnitude.array())
                delta = self._finite(delta * np.float32(weight))
        return delta.reshape(base.shape)

    def _finite(self, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        """Refuse what no weight can be; sums of what passes are finite too."""
        if not np.isfinite(np.vdot(delta, delta)):
            raise ModelError(
                f"{self.source} holds numbers that are not finite or too large to be added; "
                "download it again, or give a smaller weight"
            )
        return delta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted(Mapping[str, NDArray[Any]]):
    """A component's weights with adapters added, each computed when it is asked for.

    updates: by name, each with its weight; a name without any gives the base's own array
    """

    base: Mapping[str, NDArray[Any]]
    updates: Mapping[str, Sequence[tuple[Update, float]]]

    @property
    def touched(self) -> frozenset[str]:
        """The names whose arrays are not the base's."""
        return frozenset(self.updates)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return the base's array, or base + Σ weight · delta as a new float32 array."""
        base = self.base[name]
        if name not in self.updates:
            return base
        (first, weight), *others = self.updates[name]
        total = first.delta(base, weight)
        for update, weight in others:
            total += update.delta(base, weight)
        add_into(total, base)
        return total

    def release(self) -> None:
        """Give back the memory of what was read of the base, where it is a file's."""
        release(self.base)

    def __iter__(self) -> Iterator[str]:
        """Go through the base's names in its order."""
        return iter(self.base)

    def __len__(self) -> int:
        """Count the base's names."""
        return len(self.base)

    def __eq__(self, other: object) -> bool:
        """Equal is only itself: a mapping's equality would compute and compare every number."""
        return self is other

    def __hash__(self) -> int:
        """Hash by identity, as `==` compares."""
        return id(self)

    def __repr__(self) -> str:
        """Count; thousands of tensors help nobody."""
        return f"Adapted({len(self.updates)} of {len(self)} tensors)"

    def __contains__(self, name: object) -> bool:
        """Tell whether the base has a name, without computing anything."""
        return name in self.base
