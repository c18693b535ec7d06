from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from engine.configs.diffusion import AutoencoderConfig
from export.modules.autoencoder import Autoencoder
from tests.support.parity import randomised, relative_error, shrunk
from tests.support.tolerances import PARITY_RTOL


def levels(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


BASE: dict[str, Any] = levels(8, 16, 16) | {"layers_per_block": 1, "norm_num_groups": 4}
KINDS: dict[str, dict[str, Any]] = {
    "base": BASE,
    "sd15": BASE | levels(8, 16, 32, 32) | {"layers_per_block": 2},
    "two-levels": BASE | levels(16, 24),
    "one-level": BASE | levels(16),
    "falling-widths": BASE | levels(32, 16, 8),
    "middle-without-attention": BASE | {"mid_block_add_attention": False},
    "no-quant-conv": BASE | {"use_quant_conv": False, "use_post_quant_conv": False},
    "quant-conv-only": BASE | {"use_post_quant_conv": False},
    "post-quant-conv-only": BASE | {"use_quant_conv": False},
    "latents-16": BASE
    | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "with-alpha": BASE | {"in_channels": 4, "out_channels": 4},
}


def pair(kind: dict[str, Any]) -> tuple[AutoencoderKL, Autoencoder]:
    torch.manual_seed(0)
    reference = randomised(AutoencoderKL(**kind))
    module = Autoencoder(AutoencoderConfig.from_dict(reference.config))
    module.load_state_dict(reference.state_dict(), strict=True)
    return reference, module.eval()


@torch.no_grad()
def check(
    kind: dict[str, Any], batch: int, height: int, width: int, *, small: bool = False
) -> None:
    reference, module = pair(kind)
    if small:
        shrunk(reference)
        shrunk(module)
    config = module.config
    pixels = torch.rand(batch, config.in_channels, height, width) * 2 - 1
    posterior = reference.encode(pixels).latent_dist
    mean, std = module.encode(pixels)
    size = (height // config.compression, width // config.compression)
    assert mean.shape == (batch, config.latent_channels, *size)
    assert relative_error(mean, posterior.mean) < PARITY_RTOL
    assert relative_error(std, posterior.std) < PARITY_RTOL
    latents = torch.randn(mean.shape)
    expected = reference.decode(latents).sample
    assert relative_error(module.decode(latents), expected) < PARITY_RTOL


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_agrees_with_diffusers(kind):
    check(kind, 2, 16, 24)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 32), (4, 4), (21, 35), (18, 30)])
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_at_any_size_and_batch(batch, height, width):
    check(BASE, batch, height, width)


def test_epsilons_are_those_of_diffusers():
    check(BASE, 2, 16, 16, small=True)


@pytest.mark.parametrize("log_variance", [-100.0, 100.0])
def test_variance_is_clamped(log_variance):
    reference, module = pair(BASE)
    channels = module.config.latent_channels
    pixels = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        for model in (reference, module):
            model.quant_conv.bias[channels:] = log_variance
        expected = reference.encode(pixels).latent_dist.std
        assert relative_error(module.encode(pixels)[1], expected) < PARITY_RTOL
