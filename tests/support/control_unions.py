"""Small unions of ControlNets: diffusers' own, with random numbers in all their weights."""

from inspect import signature
from pathlib import Path

import torch
from diffusers import ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import save_file

from tests.support.controls import HINT_WIDTHS
from tests.support.small_models import SMALL

PROMAX = 8  # types of xinsir's "promax"; 6 are those of the first file


def union_of(unet: UNet2DConditionModel, types: int, **widths: int) -> ControlNetUnionModel:
    """Make a union of a UNet's way down; `from_unet` knows no widths but XL's."""
    names = signature(ControlNetUnionModel.__init__).parameters
    values = {name: value for name, value in unet.config.items() if name in names}
    return ControlNetUnionModel(**values, num_control_type=types, **widths)


def small_union(types: int = PROMAX, seed: int = 0) -> ControlNetUnionModel:
    """Make one of the small XL model's UNet, whose residuals are of the size of its features."""
    unet = SMALL["xl"].reference.unet
    width = unet.config.block_out_channels[0]
    widths = {"num_trans_channel": width, "num_proj_channel": width}
    net = union_of(unet, types, **widths, conditioning_embedding_out_channels=HINT_WIDTHS)
    generator, own = torch.Generator().manual_seed(200 + seed), unet.state_dict()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name in own:
                noise *= 0.2 * own[name].std() if noise.ndim > 1 else 0
                parameter.copy_(own[name] + noise)
            elif noise.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(float(".ln_" in name and name.endswith("weight")) + 0.1 * noise)
    return net.eval()


def write_union(net: ControlNetUnionModel, path: Path) -> Path:
    """Write one file, named as xinsir's are: what a folder of diffusers has in it."""
    save_file(net.state_dict(), path)
    return path
