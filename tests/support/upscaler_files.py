"""Small upscalers' files, made without torch."""

import numpy as np
from safetensors.numpy import save_file

from engine.configs.upsampler import UpsamplerConfig
from engine.configs.upscalers import CompactConfig, ESRGANConfig

COMPACT = CompactConfig(num_feat=8, num_conv=1, upscale=2)
ESRGAN = ESRGANConfig(num_feat=8, num_block=2, num_grow_ch=4, doublings=1)
UPSAMPLER = UpsamplerConfig(block_out_channels=(8, 16), upscale=2)


def write_upscaler(path, config=COMPACT, *, scale=0.2, seed=0, names=lambda name: name):
    """Write an upscaler with random weights; scale: 0 leaves only what passes by its layers."""
    rng = np.random.default_rng(seed)
    tensors = {
        names(name): (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    save_file(tensors, path)
    return path


def write_upsampler(path, config=UPSAMPLER, **options):
    """Write a diffusion upsampler with random weights, as `python -m training upsampler` does."""
    return write_upscaler(path, config, names="upsampler.{}".format, **options)
