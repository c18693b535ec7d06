"""The ControlNet, and the UNet that takes its residuals, against diffusers'."""

import pytest
import torch
from diffusers import ControlNetModel

from engine.configs.control_net import ControlNetConfig
from engine.configs.diffusion import UNetConfig
from export.modules.control_net import ControlNet, by_level
from export.modules.unet import UNet
from tests.support.controls import small_control_net
from tests.support.parity import relative_error
from tests.support.small_models import SMALL
from tests.support.tolerances import PARITY_RTOL


@torch.no_grad()
def test_one_without_transformers_is_diffusers_own():
    """As diffusers' small ones for XL: the middle has a residual block alone."""
    values = {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "conditioning_embedding_out_channels": (8, 8, 16, 16),
    }
    torch.manual_seed(0)
    net = ControlNetModel(**values).eval()
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
    ours = ControlNet(ControlNetConfig.from_dict(dict(net.config))).eval()
    ours.load_state_dict(net.state_dict())
    sample, context, picture = (
        torch.randn(shape) for shape in ((2, 4, 8, 6), (2, 77, 64), (2, 3, 64, 48))
    )
    timestep = torch.tensor([500.0])
    down, middle = net(sample, timestep, context, picture, return_dict=False)
    hint = ours.controlnet_cond_embedding(picture)
    maps = ours(sample, timestep, context, hint)
    for given, expected in zip(maps, [*down, middle], strict=True):
        assert relative_error(given, expected) < PARITY_RTOL


@torch.no_grad()
@pytest.mark.parametrize("sides", [(8, 8), (5, 7)])
def test_residuals_and_what_the_unet_makes_of_them(sides):
    small = SMALL["sd1"]
    net, unet = small_control_net(small), small.reference.unet
    ours = ControlNet(ControlNetConfig.from_dict(dict(net.config))).eval()
    ours.load_state_dict(net.state_dict())
    generator = torch.Generator().manual_seed(0)
    height, width = sides
    sample = torch.randn(1, 4, height, width, generator=generator)
    context = torch.randn(2, 77, 64, generator=generator)
    picture = torch.rand(1, 3, 8 * height, 8 * width, generator=generator)
    hint = ours.controlnet_cond_embedding(picture)
    timestep = torch.tensor([500.0])
    maps = ours(sample, timestep, context, hint, groups=2)
    both = sample.repeat(2, 1, 1, 1)
    down, middle = net(
        both,
        timestep,
        encoder_hidden_states=context,
        controlnet_cond=picture.repeat(2, 1, 1, 1),
        return_dict=False,
    )
    for given, expected in zip(maps, [*down, middle], strict=True):
        assert relative_error(given, expected) < PARITY_RTOL
    own = UNet(UNetConfig.from_dict(dict(unet.config))).eval()
    own.load_state_dict(unet.state_dict())
    residuals = by_level(maps, own.config.residual_widths())
    whole, deep = own.with_deep(sample, timestep, context, groups=2, residuals=residuals)
    expected = unet(
        both,
        timestep,
        context,
        down_block_additional_residuals=list(down),
        mid_block_additional_residual=middle,
    ).sample
    assert relative_error(whole, expected) < PARITY_RTOL
    told = {"groups": 2, "deep": deep}
    shallow, _ = own.with_deep(sample, timestep, context, **told, residuals=residuals[:1])
    assert relative_error(shallow, whole) < PARITY_RTOL
    plain, _ = own.with_deep(sample, timestep, context, **told)
    assert relative_error(plain, whole) > 0.01
