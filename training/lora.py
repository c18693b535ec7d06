"""LoRA in training: factors of low rank beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

A parametrization adds them to the weight in every pass, so a module's code runs as it is, and a
convolution's weight (out, in, k, k) counts as the matrix (out, in · k · k).
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """What is added to one weight: up (out, r) times down (r, in · k · k), at first nothing."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, columns = len(weight), weight[0].numel()
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.down = nn.Parameter(torch.randn(rank, columns).to(weight) / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight of the same shape with the product added."""
        return weight + (self.up @ self.down).reshape(weight.shape)


def add_lora(module: nn.Module, rank: int) -> None:
    """Freeze a module, and put factors beside the weights of its linear layers and convolutions.

    Weights whose own rank could not be above `rank` are left as they are.
    """
    module.requires_grad_(False)
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.detach()
            if min(len(weight), weight[0].numel()) > rank:
                parametrize.register_parametrization(layer, "weight", LowRank(weight, rank))


def factors(module: nn.Module) -> Iterator[tuple[str, LowRank, tuple[int, ...]]]:
    """Yield every layer's name in the module, its factors, and its weight's shape."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and parametrize.is_parametrized(layer):
            added = layer.get_submodule("parametrizations.weight.0")
            assert isinstance(added, LowRank)
            yield name, added, tuple(layer.weight.shape)


def write_lora(module: nn.Module, prefix: str, path: Path) -> None:
    """Write a module's factors as PEFT names them, in float16, whole or not at all.

    prefix: what the module is to diffusers, such as "unet"
    """
    state = {}
    for name, added, (_, *kernel) in factors(module):
        ones = [1] * len(kernel[1:])
        down = added.down.reshape(-1, *kernel)
        up = added.up.reshape(*added.up.shape, *ones)
        for side, value in (("A", down), ("B", up)):
            state[f"{prefix}.{name}.lora_{side}.weight"] = (
                value.detach().to(torch.float16).contiguous()
            )
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(path)
