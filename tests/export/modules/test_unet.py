from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from engine.configs.diffusion import UNetConfig
from export.modules.unet import UNet, sinusoids
from tests.support.deep_features import keeping_deep_features
from tests.support.parity import randomised, relative_error, shrunk
from tests.support.tolerances import PARITY_RTOL

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TEXT_WIDTH, POOLED_WIDTH, GUIDANCE_WIDTH, SIZE_WIDTH = 12, 20, 24, 8

SD15: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": (DOWN, DOWN, DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", UP, UP, UP),
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 8,
}
SD21 = SD15 | {"use_linear_projection": True, "attention_head_dim": [2, 4, 4, 8]}
TEXT_TIME = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
}
XL = (
    SD15
    | TEXT_TIME
    | {
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownBlock2D", DOWN, DOWN),
        "up_block_types": (UP, UP, "UpBlock2D"),
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * SIZE_WIDTH,
    }
)
REFINER = (
    SD15
    | TEXT_TIME
    | {
        "down_block_types": ("DownBlock2D", DOWN, DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", UP, UP, "UpBlock2D"),
        "attention_head_dim": [2, 4, 8, 8],
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 5 * SIZE_WIDTH,
    }
)
TINY = SD15 | {
    "block_out_channels": (16, 32, 48),
    "up_block_types": (UP, UP, "UpBlock2D"),
    "attention_head_dim": [1, 2, 4],
    "layers_per_block": 1,
    "mid_block_type": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd21": SD21,
    "xl": XL,
    "refiner": REFINER,
    "lcm": SD15 | {"time_cond_proj_dim": GUIDANCE_WIDTH},
    "xl-lcm": XL | {"time_cond_proj_dim": GUIDANCE_WIDTH},
    "pooled-text": SD15 | {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    "inpainting": SD15 | {"in_channels": 9},
    "learned-variance": SD15 | {"out_channels": 8},
    "layers-1": SD15 | {"layers_per_block": 1},
    "layers-by-level": XL | {"layers_per_block": (1, 3, 2)},
    "middle-without-attention": SD15 | {"mid_block_type": "UNetMidBlock2D"},
    "sines-first": SD15 | {"flip_sin_to_cos": False, "freq_shift": 1},
    "wide-epsilon": SD15 | {"norm_eps": 1e-2},
    "one-level": SD15
    | {"block_out_channels": (32,), "down_block_types": (DOWN,), "up_block_types": (UP,)},
    "attention-down-only": XL | {"up_block_types": ("UpBlock2D", UP, "UpBlock2D")},
    "bk-sdm-small": SD15 | {"layers_per_block": 1, "mid_block_type": None},
    "sdxs": TINY | {"down_block_types": ("DownBlock2D", DOWN, DOWN)},
    "sdxs-of-sd2": TINY
    | {
        "down_block_types": (DOWN, DOWN, DOWN),
        "up_block_types": (UP, UP, UP),
        "only_cross_attention": [True, False, False],
        "use_linear_projection": True,
    },
    "text-alone": SD15 | {"only_cross_attention": True},
    "ssd-1b": XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [3, 3]],
        "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1],
    },
    "uneven-with-a-middle": XL
    | {
        "transformer_layers_per_block": [1, [2, 1], [3, 2]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], 2, 1],
    },
    "attention-nowhere": SD15
    | {
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": 7,  # divides nothing, and nothing asks it to
    },
}


def pair(kind: dict[str, Any]) -> tuple[UNet2DConditionModel, UNet]:
    torch.manual_seed(0)
    reference = randomised(UNet2DConditionModel(**kind))
    module = UNet(UNetConfig.from_dict(reference.config))
    module.load_state_dict(reference.state_dict(), strict=True)
    return reference, module.eval()


@torch.no_grad()
def error(
    kind: dict[str, Any], batch: int, height: int, width: int, *, small: bool = False
) -> float:
    reference, module = pair(kind)
    if small:
        shrunk(reference)
        shrunk(module)
    given = inputs(module.config, batch, height, width)
    expected, actual = run_reference(reference, **given), module(**given)
    assert actual.shape == (batch, module.config.out_channels, height, width)
    return relative_error(actual, expected)


def inputs(config: UNetConfig, batch: int, height: int, width: int) -> dict[str, Tensor]:
    given = {
        "sample": torch.randn(batch, config.in_channels, height, width),
        "timestep": torch.tensor([3, 999, 500])[:batch],
        "context": torch.randn(batch, 7, TEXT_WIDTH),
    }
    if config.addition_embed_type == "text_time":
        sizes = (config.projection_class_embeddings_input_dim - POOLED_WIDTH) // SIZE_WIDTH
        given["text_embeds"] = torch.randn(batch, POOLED_WIDTH)
        given["time_ids"] = torch.randint(0, 1024, (batch, sizes))
    if config.time_cond_proj_dim:
        given["timestep_cond"] = torch.randn(batch, GUIDANCE_WIDTH)
    return given


def run_reference(
    reference: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    timestep_cond: Tensor | None = None,
    **added: Tensor,
) -> Tensor:
    return reference(
        sample, timestep, context, timestep_cond=timestep_cond, added_cond_kwargs=added
    ).sample


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_agrees_with_diffusers(kind):
    assert error(kind, 2, 16, 24) < PARITY_RTOL


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_deep_features_of_another_call_agree_with_diffusers(kind):
    reference, module = pair(kind)
    first, second = (inputs(module.config, 2, 16, 24) for _ in range(2))
    with keeping_deep_features(reference, 2):
        expected = [run_reference(reference, **given) for given in (first, second)]
    whole, deep = module.with_deep(**first)
    assert deep.shape == (2, module.config.block_out_channels[0], 16, 24)
    assert relative_error(whole, expected[0]) < PARITY_RTOL
    shallow, same = module.with_deep(**second, deep=deep)
    assert same is deep
    assert relative_error(shallow, expected[1]) < PARITY_RTOL
    assert relative_error(module(**second), expected[1]) > 10 * PARITY_RTOL


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_groups_of_texts_over_one_sample_agree_with_diffusers(kind):
    reference, module = pair(kind)
    given = inputs(module.config, 2, 9, 12)
    shared = {"sample", "timestep", "timestep_cond"}
    texts = {
        name: torch.cat([value, value.flip(0)]) if name not in shared else value
        for name, value in given.items()
    }
    repeated = {
        name: torch.cat([value, value]) if name in shared else value
        for name, value in texts.items()
    }
    expected = run_reference(reference, **repeated)
    whole, deep = module.with_deep(**texts, groups=2)
    assert relative_error(whole, expected) < PARITY_RTOL
    assert deep.shape == (4, module.config.block_out_channels[0], 9, 12)
    shallow, _ = module.with_deep(**texts, groups=2, deep=deep)
    assert relative_error(shallow, expected) < PARITY_RTOL


@torch.no_grad()
def test_what_comes_before_the_text_is_computed_once():
    _, module = pair(SD15)
    rows = {}

    def note(name):
        return lambda _, given, __: rows.update({name: len(given[0])})

    block = module.down_blocks[0]
    layers = {
        "conv_in": module.conv_in,
        "conv1": block.resnets[0].conv1,
        "conv2": block.resnets[0].conv2,
        "attn1": block.attentions[0].transformer_blocks[0].attn1,
        "attn2": block.attentions[0].transformer_blocks[0].attn2,
        "next": block.resnets[1].conv1,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(note(name))
    given = inputs(module.config, 1, 8, 8)
    module.with_deep(**(given | {"context": torch.randn(2, 7, TEXT_WIDTH)}), groups=2)
    assert rows == {"conv_in": 1, "conv1": 1, "conv2": 1, "attn1": 1, "attn2": 2, "next": 2}


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 32), (9, 7), (13, 10), (10, 12)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [SD15, XL], ids=["sd15", "xl"])
def test_agrees_at_any_size_and_batch(kind, batch, height, width):
    assert error(kind, batch, height, width) < PARITY_RTOL


@pytest.mark.parametrize("kind", [SD15, SD21], ids=["sd15", "sd21"])
def test_epsilons_are_those_of_diffusers(kind):
    assert error(kind, 2, 16, 16, small=True) < PARITY_RTOL


def test_rows_of_a_batch_do_not_meet():
    _, module = pair(XL)
    sample, context = torch.randn(3, 4, 8, 8), torch.randn(3, 5, TEXT_WIDTH)
    pooled, sizes = torch.randn(3, POOLED_WIDTH), torch.randint(0, 1024, (3, 6))
    timestep = torch.tensor([1, 400, 800])
    with torch.no_grad():
        whole = module(sample, timestep, context, text_embeds=pooled, time_ids=sizes)
        for i in range(3):
            row = slice(i, i + 1)
            alone = module(
                sample[row],
                timestep[row],
                context[row],
                text_embeds=pooled[row],
                time_ids=sizes[row],
            )
            assert relative_error(alone, whole[row]) < PARITY_RTOL


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids_agree_with_diffusers(flip, shift):
    timesteps = torch.tensor([0.0, 0.25, 1.0, 500.0, 999.0])
    expected = get_timestep_embedding(
        timesteps, 32, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    actual = sinusoids(timesteps, 32, flip=flip, shift=shift)
    assert relative_error(actual, expected) < PARITY_RTOL


def test_an_unknown_weight_is_refused():
    reference, module = pair(SD15)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(reference.state_dict() | {"other": torch.zeros(1)})
