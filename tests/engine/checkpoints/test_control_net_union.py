"""Unions of ControlNets from every kind of file: names against diffusers', and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.families.sd import SD1
from engine.checkpoints.families.xl import XL
from engine.checkpoints.ldm_names import control_net_sources
from engine.configs.control_net import control_net_of
from engine.configs.control_net_union import (
    CONTROL_TYPES,
    ControlNetUnionConfig,
    listed_types,
    type_place,
)
from engine.errors import ModelError
from tests.support.control_unions import union_of
from tests.support.original_layout import write_sparse
from tests.support.published_configs import UNET_XL

WIDTHS = (16, 32, 96, 256)  # of the hint's encoder in the published files
COUNTS = {"union": 6, "promax": 8}


def published(types):
    """Return diffusers' own model of XL's size, without numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET_XL)
        return union_of(unet, types, conditioning_embedding_out_channels=WIDTHS)


def config_of(types):
    return replace(control_net_of(XL, ControlNetUnionConfig), num_control_type=types)


@pytest.fixture(scope="module", params=COUNTS)
def full(request):
    return COUNTS[request.param], published(COUNTS[request.param])


def shapes_of(net):
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def test_names_and_shapes_are_diffusers_own(full):
    types, net = full
    assert config_of(types).tensor_shapes() == shapes_of(net)


@pytest.mark.parametrize("prefix", ["", "controlnet.", "control_model."])
def test_a_file_of_full_size_is_of_the_published_architecture(full, prefix, tmp_path):
    types, net = full
    shapes = {prefix + name: shape for name, shape in shapes_of(net).items()}
    config, component = open_control_net(write_sparse(tmp_path / "net.safetensors", shapes), XL)
    assert config == config_of(types)
    assert config.control_types == types
    assert component.used() == shapes.keys()


def test_so_is_one_of_the_original_names(tmp_path):
    config = config_of(6)
    sources, shapes = control_net_sources(config), config.tensor_shapes()
    stored = {source.name: shapes[name] for name, source in sources.items()}
    assert {"task_embedding", "input_hint_block.0.weight"} <= stored.keys()
    found, component = open_control_net(write_sparse(tmp_path / "net.safetensors", stored), XL)
    assert found == config
    assert component.used() == stored.keys()


@pytest.mark.parametrize("said", [None, 6, 8])
def test_a_folder_is_read_whatever_it_says_of_its_types(full, said, tmp_path):
    types, net = full
    stated = json.loads(net.to_json_string())
    del stated["num_control_type"]
    stated |= {} if said is None else {"num_control_type": said}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    write_sparse(tmp_path / "diffusion_pytorch_model.safetensors", shapes_of(net))
    config, _ = open_control_net(tmp_path, XL)
    assert config.key() == config_of(types).key()


def without(name):
    return lambda shapes: shapes.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("task_embedding"), "lacks task_embedding"),
        (without("control_add_embedding.linear_1.weight"), "lacks control_add_embedding"),
        (without("transformer_layes.0.attn.in_proj_bias"), "lacks transformer_layes"),
        (without("spatial_ch_projs.weight"), "lacks spatial_ch_projs"),
        (lambda shapes: shapes.update({"task_embedding": (6, 64)}), r"task_embedding has shape"),
        (lambda shapes: shapes.update({"task_embedding": ()}), "task_embedding has shape"),
        (lambda shapes: shapes.update({"task_embedding": (7, 320)}), "linear_1.weight has shape"),
        (lambda shapes: shapes.update({"more.weight": (1,)}), r"holds more\.weight"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(change, message, tmp_path):
    shapes = config_of(6).tensor_shapes()
    change(shapes)
    with pytest.raises(ModelError, match=message):
        open_control_net(write_sparse(tmp_path / "net.safetensors", shapes), XL)


def test_one_for_another_family_is_refused(tmp_path):
    path = write_sparse(tmp_path / "net.safetensors", config_of(6).tensor_shapes())
    with pytest.raises(ModelError, match="of another family: it attends to texts of the width"):
        open_control_net(path, SD1)


def test_types_have_the_places_of_diffusers_control_modes():
    """As xinsir's model card lists them for `control_mode`."""
    assert [type_place(names[0]) for names in CONTROL_TYPES] == list(range(8))
    assert {name: type_place(name) for name in ("ted", "mlsd", "repaint", "5", "12")} == {
        "ted": 2,
        "mlsd": 3,
        "repaint": 7,
        "5": 5,
        "12": 12,
    }
    assert [type_place(name) for name in ("", "Canny", "-1", "³", "edges")] == [None] * 5
    assert listed_types(6).endswith("canny/lineart/anime_lineart/mlsd, normal, segment")
