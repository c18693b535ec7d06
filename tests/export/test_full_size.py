"""Published sizes: names, shapes and counts without memory; numbers only with `-m slow`.

Both models of a pair hold the same tensors, so the largest test takes about 12 GB.
"""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig
from export.modules.autoencoder import Autoencoder
from export.modules.clip import TextEncoder
from export.modules.unet import UNet
from tests.support import published_configs as published
from tests.support.parity import relative_error, text_checkpoint
from tests.support.tolerances import PARITY_RTOL

UNETS = {  # configuration, parameters
    "sd15": (published.UNET_SD15, 859_520_964),
    "sd21": (published.UNET_SD21, 865_910_724),
    "xl": (published.UNET_XL, 2_567_463_684),
    "refiner": (published.UNET_REFINER, None),
}
TEXT_ENCODERS = {
    "sd15": (published.TEXT_SD15, 123_060_480),
    "sd21": (published.TEXT_SD21, 340_387_840),
    "xl-2": (published.TEXT_XL_2, 694_659_840),
}
AUTOENCODERS = {
    "sd15": (published.VAE_SD15, 83_653_863),
    "xl": (published.VAE_XL, 83_653_863),
}


def unets(values: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    reference = UNet2DConditionModel.from_config(values)
    with torch.device("meta"):
        return reference, UNet(UNetConfig.from_dict(values))


def text_encoders(values: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    projected = values["architectures"] == ["CLIPTextModelWithProjection"]
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    reference = model_class(CLIPTextConfig.from_dict(values))
    with torch.device("meta"):
        return reference, TextEncoder(TextEncoderConfig.from_dict(values))


def autoencoders(values: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    reference = AutoencoderKL.from_config(values)
    with torch.device("meta"):
        return reference, Autoencoder(AutoencoderConfig.from_dict(values))


def checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    return text_checkpoint(model) if isinstance(model, CLIPTextModel) else model.state_dict()


CASES = [
    pytest.param(build, *case, id=f"{build.__name__}-{name}")
    for build, cases in (
        (unets, UNETS),
        (text_encoders, TEXT_ENCODERS),
        (autoencoders, AUTOENCODERS),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(("build", "values", "parameters"), CASES)
def test_names_and_shapes_are_the_published_ones(build, values, parameters):
    with torch.device("meta"):
        reference, module = build(values)
    expected = {name: value.shape for name, value in checkpoint(reference).items()}
    assert {name: value.shape for name, value in module.state_dict().items()} == expected
    if parameters is not None:
        assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def shared(build: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """Give both models the same random weights in the same memory."""
    torch.manual_seed(0)
    reference, module = build(values)
    module.load_state_dict(checkpoint(reference), strict=True, assign=True)
    return reference.eval(), module.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_agrees_with_diffusers(name):
    values = UNETS[name][0]
    reference, module = shared(unets, values)
    sample, context = torch.randn(1, 4, 32, 24), torch.randn(1, 77, values["cross_attention_dim"])
    timestep, added = torch.tensor([500]), {}
    if module.config.addition_embed_type:
        ids = 5 if name == "refiner" else 6
        added = {
            "text_embeds": torch.randn(1, 1280),
            "time_ids": torch.randint(0, 1024, (1, ids)),
        }
    expected = reference(sample, timestep, context, added_cond_kwargs=added).sample
    assert relative_error(module(sample, timestep, context, **added), expected) < PARITY_RTOL


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_ENCODERS)
@torch.no_grad()
def test_text_encoder_agrees_with_transformers(name):
    values = TEXT_ENCODERS[name][0]
    reference, module = shared(text_encoders, values)
    input_ids = torch.randint(0, 49406, (2, 77))
    input_ids[:, 0], input_ids[:, 20:] = 49406, 49407
    expected = reference(input_ids, output_hidden_states=True)
    last, penultimate, pooled = module(input_ids)
    assert relative_error(last, expected.last_hidden_state) < PARITY_RTOL
    assert relative_error(penultimate, expected.hidden_states[-2]) < PARITY_RTOL
    expected_pooled = expected.text_embeds if name == "xl-2" else expected.pooler_output
    assert relative_error(pooled, expected_pooled) < PARITY_RTOL


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_agrees_with_diffusers():
    reference, module = shared(autoencoders, published.VAE_SD15)
    pixels = torch.rand(1, 3, 256, 192) * 2 - 1
    posterior = reference.encode(pixels).latent_dist
    mean, std = module.encode(pixels)
    assert relative_error(mean, posterior.mean) < PARITY_RTOL
    assert relative_error(std, posterior.std) < PARITY_RTOL
    expected = reference.decode(mean).sample
    assert relative_error(module.decode(mean), expected) < PARITY_RTOL
