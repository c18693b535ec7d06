"""Names and shapes without torch, against the modules that are traced."""

import pytest
import torch
from torch import nn

from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig
from export.modules.autoencoder import Autoencoder
from export.modules.clip import TextEncoder
from export.modules.unet import UNet
from tests.support import published_configs as published

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SMALL = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=(DOWN, "DownBlock2D"),
    up_block_types=("UpBlock2D", UP),
    cross_attention_dim=32,
)
UNETS = {
    "sd15": UNetConfig.from_dict(published.UNET_SD15),
    "sd21": UNetConfig.from_dict(published.UNET_SD21),
    "xl": UNetConfig.from_dict(published.UNET_XL),
    "refiner": UNetConfig.from_dict(published.UNET_REFINER),
    "inpainting": UNetConfig.from_dict(published.UNET_SD15 | {"in_channels": 9}),
    "lcm": UNetConfig.from_dict(published.UNET_SD15 | {"time_cond_proj_dim": 256}),
    "small": SMALL,
    "one level": UNetConfig(
        block_out_channels=(32,), down_block_types=(DOWN,), up_block_types=("UpBlock2D",)
    ),
    "layers": UNetConfig(
        block_out_channels=(32, 64, 96),
        layers_per_block=(1, 3, 2),
        transformer_layers_per_block=(1, 3, 2),
        down_block_types=("DownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "UpBlock2D"),
        attention_head_dim=4,
    ),
    "no attention in the middle": UNetConfig(
        block_out_channels=(32, 64),
        down_block_types=(DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", UP),
        mid_block_type="UNetMidBlock2D",
    ),
    "text": UNetConfig(
        block_out_channels=(32,),
        down_block_types=(DOWN,),
        up_block_types=(UP,),
        addition_embed_type="text",
        cross_attention_dim=128,
        out_channels=8,
    ),
}
TEXT_ENCODERS = {
    "sd15": TextEncoderConfig.from_dict(published.TEXT_SD15),
    "sd21": TextEncoderConfig.from_dict(published.TEXT_SD21),
    "xl-2": TextEncoderConfig.from_dict(published.TEXT_XL_2),
    "small": TextEncoderConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=4,
    ),
}
AUTOENCODERS = {
    "sd15": AutoencoderConfig.from_dict(published.VAE_SD15),
    "xl": AutoencoderConfig.from_dict(published.VAE_XL),
    "small": AutoencoderConfig(
        block_out_channels=(32, 64, 32),
        layers_per_block=1,
        latent_channels=16,
        in_channels=1,
        out_channels=2,
    ),
    "bare": AutoencoderConfig(
        block_out_channels=(32,),
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
CASES = [
    pytest.param(module, config, id=f"{module.__name__}-{name}")
    for module, configs in (
        (UNet, UNETS),
        (TextEncoder, TEXT_ENCODERS),
        (Autoencoder, AUTOENCODERS),
    )
    for name, config in configs.items()
]


@pytest.mark.parametrize(("module", "config"), CASES)
def test_names_and_shapes_are_those_of_the_module(module: type[nn.Module], config):
    with torch.device("meta"):
        state = module(config).state_dict()
    assert config.tensor_shapes() == {name: tuple(value.shape) for name, value in state.items()}
