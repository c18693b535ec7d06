"""The graphs of a union of ControlNets, and what `info` says of it."""

import pytest

from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.families.xl import XL
from engine.checkpoints.formats.files import Weights
from engine.configs.control_net import control_net_of
from engine.configs.control_net_union import ControlNetUnionConfig
from engine.graphs.graph import graph_name
from engine.model import Model
from export import writing
from export.info import describe
from tests.support.control_unions import PROMAX, small_union, write_union
from tests.support.original_layout import write_sparse
from tests.support.small_models import SMALL
from tests.support.traced import trace_once

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_union_is_traced_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "trace", trace_once)
    model = Model.open(SMALL["xl"].write_file(tmp_path))
    net = write_union(small_union(), tmp_path / "union.safetensors")
    lines = [*writing.export_control_net(model, net, "float32", tmp_path)]
    assert len(lines) == 2
    assert all("relative error" in line for line in lines)
    config, _ = open_control_net(net, model.unet)
    assert config.control_types == PROMAX
    for part in ("control_hint", "control"):
        assert (tmp_path / graph_name(part, config, "float32")).is_file()


def test_info_lists_its_types(tmp_path, monkeypatch):
    monkeypatch.setattr(Weights, "content_hash", lambda self: "gigabytes of nothing")
    config = control_net_of(XL, ControlNetUnionConfig)
    facts = describe(write_sparse(tmp_path / "net.safetensors", config.tensor_shapes()))
    assert (facts["kind"], facts["family"]) == ("union of ControlNets", "Stable Diffusion XL")
    assert facts["use"] == "give it as --control, with a --control-image and a --control-type"
    assert facts["types"].split(", ")[:2] == ["openpose", "depth"]
    assert len(facts["types"].split(", ")) == 6
    assert facts["used_tensors"] == sum(facts["tensors"].values()) == len(config.tensor_shapes())
    assert facts["notes"] == []
