"""Small parts of every kind, smaller than any model that is published."""

import dataclasses
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from engine.configs.diffusion import AutoencoderConfig, Config, TextEncoderConfig, UNetConfig
from engine.graphs.graph import Part
from export.tracing import build_module

TEXT = TextEncoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    eos_token_id=49,
)
UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
INPAINTING = dataclasses.replace(UNET, in_channels=9)
PROJECTED = dataclasses.replace(TEXT, projection_dim=12, hidden_act="gelu", eos_token_id=7)
HALF = {
    "text_encoder": ("text_encoder", TEXT),
    "text_encoder_2": ("text_encoder_2", PROJECTED),
    "step": ("step", INPAINTING),
    "step_shallow": ("step_shallow", INPAINTING),
    "vae_decoder": ("vae_decoder", VAE),
    "vae_encoder": ("vae_encoder", VAE),
}


def build(part: Part, config: Config) -> nn.Module:
    torch.manual_seed(0)
    return build_module(part, config)


def weights_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in module.model.state_dict().items()}
