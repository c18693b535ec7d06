from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from numpy.typing import NDArray
from torch import nn

from engine.adapters.lora import (
    Change,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Transposed,
    decompose,
)
from tests.support.tolerances import ADAPTER_RTOL

RNG = np.random.default_rng(0)
LAYERS = {
    "linear": lambda: nn.Linear(20, 12),
    "1x1": lambda: nn.Conv2d(20, 12, 1),
    "3x3": lambda: nn.Conv2d(20, 12, 3),
    "1x3": lambda: nn.Conv2d(20, 12, (1, 3)),
}


@dataclass(frozen=True)
class Held:
    """A factor in memory."""

    held: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def array(self) -> NDArray[Any]:
        return self.held


def held(value: Any) -> Held:
    return Held(value.detach().numpy() if isinstance(value, torch.Tensor) else value)


def zeros(*shape: int) -> Held:
    return Held(np.zeros(shape, np.float32))


def lycoris(kind: type[Any], layer: nn.Module, **options: Any) -> Any:
    """Make a LyCORIS module of random numbers, with a scale of 3/4."""
    torch.manual_seed(0)
    module = kind("name", layer, lora_dim=4, alpha=3.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) + 0.1)
    return module.eval()


def close(actual: NDArray[Any], expected: Any) -> None:
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    actual = actual.reshape(expected.shape)
    assert actual.dtype == np.float32
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(actual - expected) <= ADAPTER_RTOL * np.linalg.norm(expected)


def matches(change: Change, expected: torch.Tensor, scale: float) -> None:
    rows, columns = len(expected), expected[0].numel()
    assert change.matrix_shape == (rows, columns)
    close(change.matrix(scale), expected)
    close(change.matrix(), expected / scale)


def side(module: Any, name: str, core: str | None = None) -> LowRank:
    up, down = held(getattr(module, f"{name}_a")), held(getattr(module, f"{name}_b"))
    if core is None:
        return LowRank(up=up, down=down)
    return LowRank(up=Transposed(stored=up), down=down, core=held(getattr(module, core)))


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_lora_agrees_with_lycoris(layer: str, tucker: bool) -> None:
    module = lycoris(LoConModule, LAYERS[layer](), use_tucker=tucker)
    core = held(module.lora_mid.weight) if module.tucker else None
    assert (core is not None) == (tucker and layer.endswith("x3"))
    change = LowRank(up=held(module.lora_up.weight), down=held(module.lora_down.weight), core=core)
    assert change.rank == 4
    matches(change, module.get_diff_weight()[0], 0.75)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_loha_agrees_with_lycoris(layer: str, tucker: bool) -> None:
    module = lycoris(LohaModule, LAYERS[layer](), use_tucker=tucker)
    t1, t2 = ("hada_t1", "hada_t2") if module.tucker else (None, None)
    change = Hadamard(first=side(module, "hada_w1", t1), second=side(module, "hada_w2", t2))
    assert change.rank == 4
    # LyCORIS' get_diff_weight multiplies by the scale again; what it trains is get_weight
    matches(change, module.get_weight(module.shape), 0.75)


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"full_matrix": True}])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_lokr_agrees_with_lycoris(layer: str, both: bool, options: dict[str, bool]) -> None:
    small = LAYERS[layer]()
    wide = (
        nn.Linear(400, 360)
        if isinstance(small, nn.Linear)
        else nn.Conv2d(400, 360, small.kernel_size)
    )
    module = lycoris(LokrModule, wide, decompose_both=both, **options)
    first = Difference(diff=held(module.lokr_w1)) if module.use_w1 else side(module, "lokr_w1")
    if module.use_w2:
        second: Change = Difference(diff=held(module.lokr_w2))
    else:
        second = side(module, "lokr_w2", "lokr_t2" if module.tucker else None)
    change = Kronecker(first=first, second=second)
    whole = module.use_w1 and module.use_w2
    assert change.rank == (None if whole else 4)
    matches(change, module.get_weight(module.shape), 1.0 if whole else 0.75)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_dora_agrees_with_lycoris(layer: str, on_output: bool) -> None:
    original = LAYERS[layer]()
    module = lycoris(LoConModule, original, weight_decompose=True, wd_on_out=on_output)
    module.dora_scale.data.abs_().add_(0.5)
    base = original.weight.detach().numpy()
    change = LowRank(up=held(module.lora_up.weight), down=held(module.lora_down.weight))
    delta = decompose(base, change.matrix(0.75), module.dora_scale.detach().numpy())
    close(base + delta.reshape(base.shape), module.get_merged_weight()[0])


def test_dora_with_the_norms_of_the_base_and_no_change_is_no_change() -> None:
    base = RNG.standard_normal((6, 4)).astype(np.float32)
    norms = np.linalg.norm(base, axis=1, keepdims=True)
    delta = decompose(base, np.zeros((6, 4), np.float32), norms)
    assert np.abs(delta).max() <= ADAPTER_RTOL


def test_a_difference_is_read_as_a_new_array() -> None:
    for shape in ((5,), (5, 3), (5, 3, 2, 2)):
        diff = RNG.standard_normal(shape).astype(np.float32)
        change = Difference(diff=Held(diff))
        assert change.rank is None
        assert change.matrix_shape == (5, diff[0].size)
        assert not np.shares_memory(change.matrix(), diff)
        close(change.matrix(-2.0), -2 * diff)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_factors_of_every_float_are_multiplied_in_float32(dtype: type[Any]) -> None:
    up, down = (RNG.standard_normal(shape).astype(dtype) for shape in ((9, 2), (2, 7)))
    change = LowRank(up=Held(up), down=Held(down))
    close(change.matrix(), (up.astype(np.float64) @ down.astype(np.float64)))


def test_factors_of_convolutions_and_linear_layers_are_the_same_matrix() -> None:
    up, down = RNG.standard_normal((8, 2)), RNG.standard_normal((2, 8))
    linear = LowRank(up=Held(up), down=Held(down))
    convolution = LowRank(up=Held(up[..., None, None]), down=Held(down[..., None, None]))
    assert linear.matrix_shape == convolution.matrix_shape == (8, 8)
    assert np.array_equal(linear.matrix(), convolution.matrix())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(up=zeros(8, 2), down=zeros(3, 8)),
        lambda: LowRank(up=zeros(8, 2), down=zeros(2, 8), core=zeros(2, 3, 3, 3)),
        lambda: LowRank(up=zeros(8, 2), down=zeros(2, 8), core=zeros()),
        lambda: LowRank(up=zeros(8, 2), down=zeros()),
        lambda: LowRank(up=zeros(8, 0), down=zeros(0, 8)),
        lambda: LowRank(up=zeros(8), down=zeros(2, 8)),
        lambda: Hadamard(
            first=LowRank(up=zeros(8, 2), down=zeros(2, 8)),
            second=LowRank(up=zeros(8, 2), down=zeros(2, 9)),
        ),
        lambda: Difference(diff=zeros()),
        lambda: Difference(diff=zeros(4, 0)),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"its factors do not fit|empty or a single|one side of"):
        make()
