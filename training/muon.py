"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks").

All singular values of an update become about 1, so rare directions move as fast as common ones;
diffusion models of this size learn in far fewer steps than with AdamW. Convolutions are matrices
of (out, in · height · width). The update is scaled to the size that AdamW's has, so both share one
learning rate (Liu et al. 2025, arXiv:2502.16982, equation 4).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pushes singular values towards 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Optimise weights of two dimensions or more; everything else belongs to AdamW."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update; gradients must be there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
        matrix = nesterov.flatten(1)
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = orthogonalise(matrix).view(nesterov.shape)
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return U Vᵀ of the matrix's singular value decomposition, roughly, by Newton and Schulz.

    (m, n) float32 -> (m, n) float32; singular values come out between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether Muon should have a weight: all matrices but embeddings and the outermost."""
    others = (
        "token_embedding",
        "position_embedding",
        "positional_embedding",
        "conv_in",
        "conv_out",
    )
    return parameter.ndim >= 2 and not any(word in name for word in others)
