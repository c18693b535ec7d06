"""`python -m export control-net` and `info` of a union of ControlNets."""

import pytest

from engine.checkpoints.families.xl import XL
from engine.checkpoints.formats.files import Weights
from engine.configs.control_net import control_net_of
from engine.configs.control_net_union import ControlNetUnionConfig
from engine.graphs.graph import graph_name
from export import writing
from export.__main__ import main
from export.info import describe
from runtime import Pipeline
from tests.support.control_unions import PROMAX, small_union, write_union
from tests.support.original_layout import write_sparse
from tests.support.small_models import SMALL
from tests.support.traced import trace_once

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_union_is_traced_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "trace", trace_once)
    file, out = SMALL["xl"].write_file(tmp_path), tmp_path / "graphs"
    net = write_union(small_union(), tmp_path / "union.safetensors")
    asked = ["control-net", str(net), "--model", str(file), "--out", str(out)]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("relative error" in line for line in lines)
    config = Pipeline.load(file, controls={"a": net}).control_nets.config("a")
    assert config.control_types == PROMAX
    for part in ("control_hint", "control"):
        assert (out / graph_name(part, config, "float32")).is_file()


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
