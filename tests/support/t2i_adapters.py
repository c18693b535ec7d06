"""Small T2I-Adapters of small models: diffusers' own with random weights, in every naming."""

import re
from pathlib import Path

import torch
from diffusers import T2IAdapter
from safetensors.torch import save_file

SCALE = 2.5
BLOCKS = 2  # in a row of a full adapter of TencentARC's


def small_t2i_adapter(
    channels: tuple[int, ...], *, kind: str = "full_adapter", gray: bool = False, seed: int = 0
) -> T2IAdapter:
    """Make an adapter whose features are of these widths; diffusers' light one has one more.

    kind: as diffusers calls it, "full_adapter", "full_adapter_xl" or "light_adapter"
    """
    torch.manual_seed(200 + seed)
    adapter = T2IAdapter(
        in_channels=1 if gray else 3,
        channels=list(channels),
        num_res_blocks=3 if kind == "light_adapter" else BLOCKS,
        downscale_factor=16 if kind == "full_adapter_xl" else 8,
        adapter_type=kind,
    )
    del adapter.adapter.body[len(channels) :]
    with torch.no_grad():  # to features of the size of a UNet's, which torch's own start is not
        for parameter in adapter.parameters():
            parameter.mul_(SCALE if parameter.ndim > 1 else 1)
    return adapter.eval()


def original_names(adapter: T2IAdapter) -> dict[str, torch.Tensor]:
    """Return its tensors under TencentARC's names."""
    light, named = adapter.config.adapter_type == "light_adapter", {}
    for name, tensor in adapter.state_dict().items():
        name = name.removeprefix("adapter.")
        if light:
            name = name.replace(".resnets.", ".body.")
        elif found := re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name):
            name = f"body.{BLOCKS * int(found[1]) + int(found[2] or 0)}.{found[3]}"
        named[name] = tensor.contiguous()
    return named


def write_t2i_adapter(adapter: T2IAdapter, path: Path, naming: str = "folder") -> Path:
    """Write it as diffusers' "folder", or as a file with "original" names or diffusers' own."""
    if naming == "folder":
        adapter.save_pretrained(path)
    else:
        save_file(original_names(adapter) if naming == "original" else adapter.state_dict(), path)
    return path
