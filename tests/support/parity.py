"""Comparing modules with the reference libraries: weights that all matter, and one distance."""

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def randomised(module: M, seed: int = 0) -> M:
    """Move norms and biases off the ones and zeros they start at, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def shrunk(module: M, factor: float = 0.05) -> M:
    """Shrink every parameter, so that variances are small beside the norms' epsilons."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= factor
    return module


def text_checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """Name the weights as published files do; CLIPTextModel leaves out the prefix since 5.0."""
    return {
        name
        if name.startswith(("text_model.", "text_projection."))
        else f"text_model.{name}": value
        for name, value in model.state_dict().items()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual - expected).norm() / expected.norm())
