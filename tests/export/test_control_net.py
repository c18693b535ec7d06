"""`python -m export control-net`: the graphs of a ControlNet and of the step that it steers."""

import pytest

from engine.errors import USER_ERROR
from engine.graphs.graph import graph_name
from engine.model import Model
from export import writing
from export.__main__ import main
from runtime import Pipeline
from tests.support.controls import small_control_net, write_control_net
from tests.support.small_models import SMALL
from tests.support.traced import trace_once

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_control_net_and_its_step_are_traced_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "trace", trace_once)
    small, out = SMALL["sd1"], tmp_path / "graphs"
    file = small.write_file(tmp_path)
    net = write_control_net(small_control_net(small), tmp_path / "net")
    asked = ["control-net", str(net), "--model", str(file), "--out", str(out)]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("relative error" in line for line in lines)
    model = Model.open(file)
    pipeline = Pipeline.load(file, controls={"a": net})
    config = pipeline.control_nets.config("a")
    wanted = {graph_name(part, config, "float32") for part in ("control_hint", "control")}
    steps = ("step_controlled", "step_shallow_controlled")
    wanted |= {graph_name(part, model.unet, "float32") for part in steps}
    assert {path.name for path in out.iterdir()} == wanted
    assert main(asked) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2, "the model's steps are there"
    other = write_control_net(small_control_net(SMALL["xl"]), tmp_path / "xl")
    assert main(["control-net", str(other), *asked[2:]]) == USER_ERROR
    assert "of another family" in capsys.readouterr().err
