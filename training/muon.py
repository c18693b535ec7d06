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
        """Apply one update; gradients must be there.

        Matrices of one shape are updated together: a GPU is idle at so small ones.
        """
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        matrices = torch.stack([matrix.flatten(1) for matrix in nesterov])
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        updates = orthogonalise(matrices).unbind()
        shaped = [update.view(parameters[0].shape) for update in updates]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, shaped, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return U Vᵀ of each singular value decomposition, roughly, by Newton and Schulz.

    (…, m, n) float32 -> the same; singular values come out between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


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
