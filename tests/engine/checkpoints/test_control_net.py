"""ControlNets from every kind of file: names against diffusers' converter, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.families import FAMILIES
from engine.checkpoints.families.sd import SD1, SD2
from engine.checkpoints.families.xl import XL
from engine.checkpoints.ldm_names import control_net_sources
from engine.configs.control_net import ControlNetConfig, control_net_of
from engine.errors import ModelError
from tests.support.original_layout import write_sparse
from tests.support.published_configs import UNET_XL
from tests.support.small_parts import UNET

SMALL = replace(control_net_of(UNET), conditioning_embedding_out_channels=(4, 4, 8, 8))
FULL = {"sd1": SD1, "sd2": SD2, "xl": XL}
SHARED = (  # what a ControlNet of XL has of its UNet in diffusers' configuration
    *("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "use_linear_projection", "addition_embed_type"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
# What diffusers' published `config.json` files of ControlNets say, less what is not the graph's.
SD1_JSON = {
    "_class_name": "ControlNetModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}


def original(config):
    """Return the shape of every tensor by its original name, and diffusers' name of each."""
    sources, shapes = control_net_sources(config), config.tensor_shapes()
    return {source.name: (name, shapes[name]) for name, source in sources.items()}


def numbers(config):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in config.tensor_shapes().items()}


@pytest.mark.parametrize("name", FULL)
def test_original_names_are_those_that_diffusers_converts(name):
    config = control_net_of(FULL[name])
    named = original(config)
    marked = {theirs: torch.tensor([float(i)]) for i, theirs in enumerate(named)}
    told = {"layers_per_block": 2, "class_embed_type": None}
    told["addition_embed_type"] = config.addition_embed_type
    converted = convert_controlnet_checkpoint(dict(marked), told)
    found = {ours: float(value) for ours, value in converted.items()}
    expected = {ours: float(i) for i, (ours, _) in enumerate(named.values())}
    # XL's sizes, which its converter of ControlNets leaves out: they are named as in the UNet
    added = {ours for ours in expected if ours.startswith("add_embedding.")}
    assert bool(added) == (name == "xl")
    assert found == {ours: i for ours, i in expected.items() if ours not in added}


@pytest.mark.parametrize("prefix", ["", "control_model.", "controlnet."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", FULL)
def test_files_of_full_size_are_of_the_published_architecture(name, layout, prefix, tmp_path):
    config = control_net_of(FULL[name])
    shapes = config.tensor_shapes()
    if layout == "original":
        shapes = {theirs: shape for theirs, (_, shape) in original(config).items()}
    path = write_sparse(
        tmp_path / "net.safetensors", {prefix + n: shape for n, shape in shapes.items()}
    )
    found, component = open_control_net(path, FULL[name])
    assert found == config
    assert found.key() == config.key()
    assert dict(component.shapes) == config.tensor_shapes()


def test_a_folder_s_configuration_is_the_published_architecture():
    assert ControlNetConfig.from_dict(SD1_JSON) == control_net_of(SD1)
    with pytest.raises(ModelError, match="controlnet_conditioning_channel_order = 'bgr'"):
        ControlNetConfig.from_dict(SD1_JSON | {"controlnet_conditioning_channel_order": "bgr"})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_published_unet_has_a_control_net_of_its_way_down(family):
    """Those with transformers that differ within a level too, such as SSD-1B's."""
    for unet in family.published.get("unet", ()):
        config, down = control_net_of(unet), unet.tensor_shapes()
        assert config.down_depths() == unet.down_depths()
        own = {n: s for n, s in config.tensor_shapes().items() if not n.startswith("controlnet_")}
        first = own.pop("conv_in.weight")
        assert first[0] == down["conv_in.weight"][0]
        assert own.items() <= down.items()


@pytest.mark.parametrize(
    ("attends", "depths", "middle"),
    [
        ((False, True, True), (1, 2, 10), True),
        ((False, True, True), (0, 1, 1), True),
        ((False, False, False), (1, 2, 10), False),
        ((False, False, False), (0, 0, 0), False),
        ((False, False, False), (0, 0, 2), True),
    ],
)
def test_smaller_ones_of_xl_are_the_same_in_a_folder_and_alone(attends, depths, middle, tmp_path):
    """Whatever diffusers' configuration says of levels that have no transformers."""
    told = {name: UNET_XL[name] for name in SHARED if name in UNET_XL}
    kinds = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    with torch.device("meta"):
        net = ControlNetModel(
            **told,
            down_block_types=kinds,
            transformer_layers_per_block=list(depths),
            mid_block_type="UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        )
    (tmp_path / "config.json").write_text(net.to_json_string())
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    file = write_sparse(tmp_path / "diffusion_pytorch_model.fp16.safetensors", shapes)
    configs = []
    for path in (tmp_path, file):
        config, component = open_control_net(path, XL)
        assert component.used() == shapes.keys()
        configs.append(config)
    assert configs[0].key() == configs[1].key()


@pytest.mark.parametrize("whole", [False, True])
def test_numbers_come_from_where_they_are(whole, tmp_path):
    weights = numbers(SMALL)
    stored = {
        f"control_model.{theirs}": weights[name] for theirs, (name, _) in original(SMALL).items()
    }
    if whole:  # ControlNet 1.0
        stored["model.diffusion_model.out.2.bias"] = torch.zeros(4)
        stored["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(4)
        stored["betas"] = torch.zeros(4)
    torch.save({"state_dict": stored}, tmp_path / "control_sd15_canny.pth")
    config, component = open_control_net(tmp_path / "control_sd15_canny.pth", UNET)
    assert config == SMALL
    assert component.keys() == weights.keys()
    for name, value in component.items():
        assert np.array_equal(value, weights[name].numpy()), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_controlnet": ()}, "is a control-LoRA, which is read with its model's UNet"),
        ({"difference": ()}, "is the difference of a ControlNet"),
        ({"another.weight": (1,)}, r"holds another\.weight, for which this architecture has no"),
    ],
)
def test_a_control_net_with_more_is_refused_by_what_it_is(more, message, tmp_path):
    shapes = {theirs: shape for theirs, (_, shape) in original(SMALL).items()}
    path = write_sparse(tmp_path / "net.safetensors", {**shapes, **more})
    with pytest.raises(ModelError, match=message):
        open_control_net(path, UNET)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"adapter.body.0.block1.weight": (4, 4, 3, 3)}, "is a T2I-Adapter"),
        ({"ip_adapter.1.to_k_ip.weight": (4, 4)}, "is an IP-Adapter"),
        ({"lllite_unet_input_blocks.down.0.weight": (4, 4)}, "is a ControlNet-LLLite"),
        ({"lora_unet_mid_block.lora_up.weight": (4, 4)}, "is a LoRA"),
        ({"double_blocks.0.weight": (4, 4)}, "of a diffusion transformer"),
        ({"x": (1,)}, "holds no ControlNet but x; give the file or folder of a ControlNet"),
    ],
)
def test_other_files_are_refused_by_what_they_are(shapes, message, tmp_path):
    path = write_sparse(tmp_path / "net.safetensors", shapes)
    with pytest.raises(ModelError, match=message):
        open_control_net(path, UNET)


@pytest.mark.parametrize(
    ("of", "model", "message"),
    [
        (SD1, SD2, "attends to texts of the width 768, and this model's UNet has 1024"),
        (SD2, SD1, "attends to texts of the width 1024"),
        (XL, SD1, "attends to texts of the width 2048"),
        (SD1, replace(SD1, layers_per_block=1), "gives residuals of the widths"),
    ],
)
def test_a_control_net_of_another_family_is_refused(of, model, message, tmp_path):
    shapes = {theirs: shape for theirs, (_, shape) in original(control_net_of(of)).items()}
    path = write_sparse(tmp_path / "net.safetensors", shapes)
    with pytest.raises(ModelError, match=f"of another family.*{message}"):
        open_control_net(path, model)


def test_a_missing_tensor_is_named(tmp_path):
    shapes = {theirs: shape for theirs, (_, shape) in original(SMALL).items()}
    del shapes["zero_convs.1.0.bias"]
    path = write_sparse(tmp_path / "net.safetensors", shapes)
    with pytest.raises(ModelError, match=r"lacks zero_convs\.1\.0\.bias"):
        open_control_net(path, UNET)
