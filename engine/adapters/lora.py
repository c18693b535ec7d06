"""Small changes of a weight, as arithmetic: LoRA and its kin.

    LoRA   up · down                            Hu et al. 2021, arXiv:2106.09685
    LoCon  core ×₁ up ×₂ down                   Yeh et al. 2023, arXiv:2309.14859
    LoHa   (up₁ · down₁) ⊙ (up₂ · down₂)        Hyeon-Woo et al. 2021, arXiv:2108.06098
    LoKr   w₁ ⊗ w₂                              Yeh et al. 2023, arXiv:2309.14859
    DoRA   m · (W + delta) / ‖W + delta‖ − W    Liu et al. 2024, arXiv:2402.09353

A convolution's weight (out, in, k, k) is the matrix (out, in · k · k) here, so one formula serves
both, and a 1×1 convolution takes the factors of a linear layer and the other way round.
Every class refuses factors that do not fit together by ValueError.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Change",
    "Difference",
    "Factor",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Transposed",
    "decompose",
    "with_channels",
]

Matrix = NDArray[np.float32]


class Factor(Protocol):
    """A tensor of an adapter: its shape is known, its numbers are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is stored."""

    def array(self) -> NDArray[Any]:
        """Read the numbers, of `shape`, in the dtype of the file."""


class Change(Protocol):
    """What one kind of adapter adds to one weight."""

    @property
    def rank(self) -> int | None:
        """The inner dimension; None of a change that is held in full."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the change, known without reading it."""

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Compute the change, times a number, as a new float32 matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed:
    """A matrix that is stored the other way round, as LyCORIS does beside a core."""

    stored: Factor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is used."""
        return self.stored.shape[::-1]

    def array(self) -> NDArray[Any]:
        """Read the numbers: (columns, rows) of what is stored, in the dtype of the file."""
        return self.stored.array().T


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """LoRA and LoCon.

    up, down: (out, r) and (r, in · k · k); with a core (r, s, k, k): (out, r) and (s, in)
    """

    up: Factor
    down: Factor
    core: Factor | None = None

    def __post_init__(self) -> None:
        """Check the inner dimensions."""
        inner = _flat(self.up)[1], _flat(self.down)[0]
        if self.core is None:
            _agree(inner[0] == inner[1], self.up, self.down)
        else:
            _flat(self.core)
            _agree(self.core.shape[:2] == inner, self.up, self.core, self.down)

    @property
    def rank(self) -> int:
        """The rows of `down`."""
        return self.down.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in · k · k)."""
        kernel = 1 if self.core is None else math.prod(self.core.shape[2:])
        return self.up.shape[0], _flat(self.down)[1] * kernel

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Multiply the factors to (out, in · k · k); the scale goes into a small one."""
        up, down = _read(self.up, scale), _read(self.down)
        if self.core is None:
            return up @ down
        inner = (up @ _read(self.core)).reshape(len(up), len(down), -1)  # (out, s, k · k)
        delta: Matrix = np.matmul(down.T, inner).reshape(len(up), -1)
        return delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """LoHa: two low-rank matrices, multiplied element by element."""

    first: LowRank
    second: LowRank

    def __post_init__(self) -> None:
        """Check that the two have one shape."""
        if self.first.matrix_shape != self.second.matrix_shape:
            raise ValueError(
                f"one side of it is {list(self.first.matrix_shape)} "
                f"and the other {list(self.second.matrix_shape)}"
            )

    @property
    def rank(self) -> int:
        """The inner dimension of the first; the product's own may be up to its square."""
        return self.first.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in · k · k)."""
        return self.first.matrix_shape

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Multiply both sides out to (out, in · k · k), then with each other."""
        delta = self.first.matrix(scale)
        delta *= self.second.matrix()
        return delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker:
    """LoKr: every product of two matrices' elements, each matrix whole or of low rank.

    first, second: (a, c) and (b, d · k · k)
    """

    first: Change
    second: Change

    @property
    def rank(self) -> int | None:
        """The inner dimension of the side that has one; None where both are whole."""
        return self.first.rank or self.second.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(a · b, c · d · k · k)."""
        (a, c), (b, d) = self.first.matrix_shape, self.second.matrix_shape
        return a * b, c * d

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Multiply the sides out and take every product of theirs: (out, in · k · k)."""
        first, second = self.first.matrix(scale), self.second.matrix()
        blocks: Matrix = first[:, None, :, None] * second[None, :, None, :]
        return blocks.reshape(self.matrix_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A change that is held in full, of a weight of any shape."""

    diff: Factor

    def __post_init__(self) -> None:
        """Check that there is one."""
        _flat(self.diff)

    @property
    def rank(self) -> None:
        """A full change has none."""
        return

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, all else)."""
        return _flat(self.diff)

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Read it as float32, in its own shape."""
        return np.multiply(_read(self.diff), np.float32(scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """A change of a convolution's weight, with zeros for channels that it lacks.

    shape: (out, in, k, k) of the weight; channels of the change beyond `in` are left out
    """

    change: Change
    shape: tuple[int, ...]

    @property
    def rank(self) -> int | None:
        """The change's own."""
        return self.change.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in · k · k)."""
        return self.shape[0], math.prod(self.shape[1:])

    def matrix(self, scale: float = 1.0) -> Matrix:
        """Compute the change, and pad or cut it to (out, in · k · k)."""
        kernel = math.prod(self.shape[2:])
        given = self.change.matrix(scale).reshape(self.shape[0], -1, kernel)
        whole = np.zeros((self.shape[0], self.shape[1], kernel), np.float32)
        shared = min(given.shape[1], self.shape[1])
        whole[:, :shared] = given[:, :shared]
        return whole.reshape(self.matrix_shape)


def with_channels(change: Change, shape: tuple[int, ...]) -> Change:
    """Fit a change of a UNet's first convolution to a model with more or fewer channels.

    shape: (out, in, k, k) of the model's weight. A model for inpainting takes the latent first,
    and then a mask and another latent, of which a change made for its kin says nothing.
    Returns the change itself where it fits, or is of no such pair.
    """
    rows, columns = change.matrix_shape
    kernel = math.prod(shape[2:])
    if len(shape) != 4 or rows != shape[0] or columns % kernel:
        return change
    theirs, ours = columns // kernel, shape[1]
    if ours == 2 * theirs + 1 or theirs == 2 * ours + 1:
        return Channels(change=change, shape=shape)
    return change


def decompose(base: NDArray[Any], delta: Matrix, magnitude: NDArray[Any]) -> Matrix:
    """Give W + delta the norms that DoRA learned: m · (W + delta) / ‖W + delta‖ − W.

    base: W, of any shape of two dimensions or more
    delta: a matrix of W's rows; it is written over
    magnitude: m, (out, …) with a norm for each output, or (1, in, …) with one for each input
    Returns a float32 matrix like delta.
    """
    whole = delta.reshape(base.shape)
    whole += base
    per_output = magnitude.shape[0] == base.shape[0]
    axes = tuple(range(1, base.ndim)) if per_output else (0, *range(2, base.ndim))
    norms = np.sqrt(np.sum(np.square(whole), axis=axes, keepdims=True))
    norms += np.finfo(np.float32).eps  # as LyCORIS does, for rows of zeros
    whole *= magnitude.astype(np.float32).reshape(norms.shape) / norms
    whole -= base
    return whole.reshape(delta.shape)


def _flat(factor: Factor) -> tuple[int, int]:
    """See a tensor as a matrix: the first axis, and all others."""
    if not factor.shape or 0 in factor.shape:
        raise ValueError("one of its tensors is empty or a single number")
    return factor.shape[0], math.prod(factor.shape[1:])


def _read(factor: Factor, scale: float = 1.0) -> Matrix:
    """Read a tensor as a float32 matrix, times a number."""
    matrix: Matrix = factor.array().astype(np.float32, copy=False).reshape(_flat(factor))
    return matrix if scale == 1 else matrix * np.float32(scale)


def _agree(fit: bool, *factors: Factor) -> None:
    """Refuse factors that do not fit together."""
    if not fit:
        shapes = ", ".join(str(list(factor.shape)) for factor in factors)
        raise ValueError(f"its factors do not fit together: {shapes}")
