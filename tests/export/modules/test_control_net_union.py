"""A union of ControlNets against diffusers' own."""

import pytest
import torch
from diffusers import ControlNetUnionModel, UNet2DConditionModel

from engine.checkpoints.control_net import open_control_net
from engine.configs.control_net_union import ControlNetUnionConfig
from engine.graphs.graph import Graph
from export.control import ControlUnionHint
from export.modules.control_net_union import ControlNetUnion
from tests.support.control_unions import PROMAX, small_union, union_of, write_union
from tests.support.parity import relative_error
from tests.support.published_configs import UNET_XL
from tests.support.small_models import SMALL
from tests.support.tolerances import PARITY_RTOL
from tests.support.traced import trace_once


def of(net: ControlNetUnionModel) -> ControlNetUnion:
    """Make ours of the same weights, in the same memory."""
    with torch.device("meta"):
        ours = ControlNetUnion(ControlNetUnionConfig.from_dict(dict(net.config)))
    ours.load_state_dict(net.state_dict(), strict=True, assign=True)
    return ours.eval()


def asked(place: int, types: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([place]), types).float()


def residuals(net, ours, place, sides, width, pooled):
    """Return what both add to a UNet's maps for two texts and one picture of a type."""
    generator, (height, width_) = torch.Generator().manual_seed(0), sides
    types = asked(place, net.config.num_control_type)
    sample = torch.randn(1, 4, height, width_, generator=generator)
    context = torch.randn(2, 77, width, generator=generator)
    picture = torch.rand(1, 3, 8 * height, 8 * width_, generator=generator)
    told = {
        "text_embeds": torch.randn(2, pooled, generator=generator),
        "time_ids": torch.randint(0, 1024, (2, 6), generator=generator),
    }
    timestep = torch.tensor([500.0])
    hint, type_embedding = ControlUnionHint(ours)(picture, types)
    made = ours(sample, timestep, context, hint, groups=2, type_embedding=type_embedding, **told)
    down, middle = net(
        sample.repeat(2, 1, 1, 1),
        timestep,
        encoder_hidden_states=context,
        controlnet_cond=[picture.repeat(2, 1, 1, 1)],
        control_type=types.repeat(2, 1),
        control_type_idx=[place],
        added_cond_kwargs=told,
        return_dict=False,
    )
    return made, [*down, middle]


@torch.no_grad()
@pytest.mark.parametrize(("place", "sides"), [(0, (8, 8)), (3, (5, 7)), (7, (8, 6))])
def test_residuals_are_diffusers_own(place, sides):
    net = small_union()
    ours = of(net)
    made, expected = residuals(net, ours, place, sides, 128, 64)
    for given, theirs in zip(made, expected, strict=True):
        assert relative_error(given, theirs) < PARITY_RTOL
    other, _ = residuals(net, ours, (place + 1) % PROMAX, sides, 128, 64)
    assert relative_error(other[-1], expected[-1]) > 0.01


@torch.no_grad()
def test_a_picture_s_hint_is_what_it_is_alone():
    """In diffusers the pictures of a batch attend to each other (nn.MultiheadAttention)."""
    net = small_union()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 64, 64, generator=generator)
    pictures[1] = 0  # of another mean
    types = asked(1, PROMAX).repeat(2, 1)
    hints = of(net).hint(pictures, types)
    encoded = net.controlnet_cond_embedding(pictures)
    token = encoded.mean(dim=(2, 3)) + net.task_embedding[1]

    def theirs(tokens):
        for layer in net.transformer_layes:
            tokens = layer(tokens)
        return net.spatial_ch_projs(tokens[:, 0])

    alone = torch.cat([theirs(each[None, None]) for each in token])
    assert relative_error(hints, encoded + alone[..., None, None]) < PARITY_RTOL
    assert relative_error(theirs(token[:, None]), alone) > 100 * PARITY_RTOL


def test_two_graphs_hold_every_tensor(tmp_path):
    file = write_union(small_union(), tmp_path / "union.safetensors")
    config, _ = open_control_net(file, SMALL["xl"].configs["unet"])
    held = {}
    for part in ("control_hint", "control"):
        path = tmp_path / f"{part}.onnx"
        path.write_bytes(trace_once(part, config, "float32").model.SerializeToString())
        held[part] = Graph.read(path).weights
    assert held["control_hint"].keys().isdisjoint(held["control"])
    assert held["control_hint"] | held["control"] == config.tensor_shapes()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("types", [6, 8])
def test_a_union_of_full_size_is_diffusers_own(types):
    """Of XL's size: 5 GB of random numbers, which both have."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET_XL)
    torch.manual_seed(0)
    net = union_of(unet, types, conditioning_embedding_out_channels=(16, 32, 96, 256)).eval()
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_", "spatial_ch_projs")):  # which begin as zeros
            parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
    made, expected = residuals(net, of(net), types - 1, (16, 12), 2048, 1280)
    for given, theirs in zip(made, expected, strict=True):
        assert relative_error(given, theirs) < PARITY_RTOL
