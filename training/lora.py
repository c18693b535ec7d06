"""LoRA in training: factors of low rank beside frozen layers (Hu et al. 2021, arXiv:2106.09685).

A forward hook adds what they make of a layer's input, so a module's code runs as it is. A
convolution has a convolution of its own kind down to the rank, and one of 1 × 1 up from there.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NAMINGS = ("kohya", "diffusers")
# What a component is in kohya's names: with one text encoder, and in XL.
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
KOHYA_XL = KOHYA | {"text_encoder": "lora_te1"}


class LowRank(nn.Module):
    """What is added to one layer's output: down to the rank and up from it, at first nothing."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha, self.scale = alpha, alpha / rank
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(
                layer.in_channels,
                rank,
                (layer.kernel_size[0], layer.kernel_size[1]),
                (layer.stride[0], layer.stride[1]),
                layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),  # type: ignore[arg-type]
                bias=False,
            )
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / math.sqrt(self.down.weight[0].numel()))
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, of its shape."""
        added: Tensor = self.up(self.down(x))
        return added * self.scale


def add_lora(
    module: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    chosen: Callable[[str], bool] = lambda name: True,
) -> None:
    """Freeze a module, and put factors beside its linear layers and convolutions.

    alpha: scale times the rank, 1 without; chosen: tells by a layer's name whether it learns
    Layers whose own rank could not be above `rank` are left as they are.
    """
    module.requires_grad_(False)
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not chosen(name):
            continue
        if min(len(layer.weight), layer.weight[0].numel()) > rank:
            layer.lora = LowRank(layer, rank, rank if alpha is None else alpha)
            layer.register_forward_hook(_add)


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = layer.get_submodule("lora")(inputs[0])
    return output + added


def factors(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Yield every layer's name in the module, and its factors."""
    for name, layer in module.named_modules():
        if isinstance(layer, LowRank):
            yield name.removesuffix(".lora"), layer


def write_lora(
    parts: Mapping[str, nn.Module],
    path: Path,
    *,
    naming: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write modules' factors in float16, whole or not at all.

    parts: by what they are to diffusers, such as "unet"; naming: one of NAMINGS. kohya's has the
    scale in a file's `alpha`; diffusers', which is PEFT's, in the factors.
    """
    state: dict[str, Tensor] = {}
    prefixes = KOHYA_XL if "text_encoder_2" in parts else KOHYA
    for part, module in parts.items():
        for name, added in factors(module):
            down, up = added.down.weight, added.up.weight
            if naming == "kohya":
                stem = f"{prefixes[part]}_{name.replace('.', '_')}"
                state[f"{stem}.lora_down.weight"] = down
                state[f"{stem}.lora_up.weight"] = up
                state[f"{stem}.alpha"] = torch.tensor(float(added.alpha))
            else:
                state[f"{part}.{name}.lora_A.weight"] = down
                state[f"{part}.{name}.lora_B.weight"] = up * added.scale
    halves = {
        name: value.detach().cpu().to(torch.float16).contiguous() for name, value in state.items()
    }
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, partial, metadata={"format": "pt", **(metadata or {})})
    partial.replace(path)
