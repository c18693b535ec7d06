"""The model in pixels, small enough for a test to train and trace."""

import dataclasses

from training import ddpm

TINY = dataclasses.replace(
    ddpm.UNET,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2),
)
