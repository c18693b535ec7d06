"""What the benchmark of image prompts counts and says, on a small model."""

import pytest

from benchmarks import image_prompts
from benchmarks.scenarios import Scenario
from engine.model import Model
from tests.support.ip_adapters import trace_ip_graphs
from tests.support.small_models import SMALL, trace_graphs


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, scenario = tmp_path_factory.mktemp("graphs"), Scenario.of("pictogram")
    model = Model.open(SMALL["sd1"].write_file(folder))
    trace_graphs(model, folder, ["step"])
    trace_ip_graphs(model, folder)
    return image_prompts.measure(model, scenario, 1, (folder,), 1)


def test_more_tokens_are_more_operations(measured):
    steps = measured["steps"]
    shares = [
        steps[name]["operations_share"] for name in (image_prompts.PLAIN, *image_prompts.PROMPTS)
    ]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0 < shares[1] < shares[-1] < 1
    for each in steps.values():
        assert 0 < each["seconds"]["min"] <= each["seconds"]["max"]


def test_the_table_has_every_kind(measured):
    text = image_prompts.table(measured)
    assert text.count("\n") == 2 + len(image_prompts.PROMPTS)
    assert "| four pictures, Plus |" in text
