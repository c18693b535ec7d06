"""diffusers' UNet2DModel with the weights of a diffusion upsampler's file."""

from diffusers import UNet2DModel
from safetensors.torch import load_file


def unet2d(path, config):
    """Return the module, loaded strictly."""
    levels = len(config.block_out_channels)
    unet = UNet2DModel(
        in_channels=2 * config.out_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
        norm_num_groups=8,
        class_embed_type="timestep",
    )
    state = load_file(path)
    unet.load_state_dict({n.removeprefix("upsampler."): tensor for n, tensor in state.items()})
    return unet.eval()
