"""What a ControlNet adds to a step: who is measured when, and that all compute the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import ControlNetModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import control, diffusers_folder, race, report, resumable
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.control_nets import HINT, NETS, ONE, TWO, hint_picture
from benchmarks.distances import relative_error
from benchmarks.flops import control_flops
from benchmarks.random_models import random_tensors
from benchmarks.scenarios import Scenario
from benchmarks.worker import ContenderError
from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.families.sd import SD1
from engine.configs.control_net import control_net_of
from engine.graphs.graph import find_graph
from engine.shipped import GRAPHS
from runtime import Pipeline
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.small_models import SMALL
from tests.support.small_pictures import DEPRECATIONS, write_small
from tests.support.tolerances import FLOPS_RTOL, PARITY_RTOL

pytestmark = DEPRECATIONS
EAGER, OPENVINO = "diffusers, eager float32", "latentrt, OpenVINO bfloat16"
SECONDS = {control.PLAIN: 2.0, ONE: 3.0, TWO: 4.0, HINT: 0.02}


class FakeWorker:
    """A contender whose second round is slower as a whole; OpenVINO's cannot be opened."""

    log = ()

    def __init__(self, contender, scenario, threads):
        self.contender, self.runs = contender, 0
        self.log.append(f"open {contender}")

    def ready(self, bound_s):
        if self.contender == OPENVINO:
            raise ContenderError("opening: no such backend")
        return {"parts": [part for part in SECONDS if part != HINT or self.contender == REFERENCE]}

    def run(self, part, bound_s, save=None):
        if save:
            np.save(save, np.float32([3, 4 * (9 if "bfloat16" in self.contender else 1)]))
            return {}
        self.log.append(f"{self.contender} {part}")
        self.runs += part == control.PLAIN
        return {"seconds": SECONDS[part] * self.runs, "memory": {"peak_bytes": 2**30}}

    def close(self):
        self.log.append(f"close {self.contender}")


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(race, "Worker", FakeWorker)
    monkeypatch.setattr(control, "write_control_nets", lambda scenario: {})
    flops = {control.PLAIN: 2e12, ONE: 2.6e12, TWO: 3.2e12, HINT: 2e10}
    monkeypatch.setattr(control, "control_flops", lambda scenario: flops)
    machine = {"processor": "P", "cores": 1, "peak_gflops": 1.0}
    monkeypatch.setattr(resumable, "describe", lambda: dict(machine))
    return FakeWorker.log


def test_a_contender_has_all_its_rounds_before_the_next_is_opened(log, tmp_path):
    out = tmp_path / "control.json"
    assert main(["control", "--repeats", "2", "--threads", "1", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert measured["request"]["model"].startswith("Stable Diffusion 1.5")
    rounds = [f"{REFERENCE} {part}" for part in control.PARTS] * 2
    assert log[: len(rounds) + 2] == [f"open {REFERENCE}", *rounds, f"close {REFERENCE}"]
    assert [line for line in log if line.startswith("open")] == [f"open {n}" for n in control.NAMES]
    ours, theirs = (measured["contenders"][name] for name in (REFERENCE, EAGER))
    assert ours["seconds"][control.PLAIN] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert ours["ratios"][ONE] == {"median": 1.5, "min": 1.5, "max": 1.5}, "each of its own round"
    assert ours["ratios"][TWO]["median"] == 2.0
    assert HINT in ours["seconds"]
    assert HINT not in theirs["seconds"], "it is in every step"
    assert theirs["agreement"]["agrees"] is True
    assert measured["contenders"][OPENVINO]["skipped"] == "opening: no such backend"
    log.clear()
    assert main(["control", "--repeats", "2", "--threads", "1", "--out", str(out)]) == 0
    opened = [line for line in log if not line.startswith("close")]
    assert opened == [f"open {REFERENCE}", f"open {OPENVINO}"], "what failed is tried again"


def test_the_table(log):
    table = control.control_table(control.measure(repeats=2, threads=1))
    cells = "3.00 s, 2.00 s to 4.00 s | 4.50 s, × 1.50 (1.50 to 1.50) | 6.00 s, × 2.00 (2.00 to"
    more = "× 1.30 with one ControlNet and × 1.60 with two ControlNets"
    assert f"operations: 2.00 TFLOP a step, {more}, 20.00 GFLOP a hint." in table
    assert f"| {REFERENCE} | {cells}" in table
    assert "| 30.0 ms, 20.0 ms to 40.0 ms once | 1.0 GiB | – |" in table
    assert f"| {EAGER} | {cells} 2.00) | in every step | 1.0 GiB | 0 |" in table
    assert table.count("computes something else") == 1
    assert f"- {EAGER}: channels_last" in table
    assert f"- not measured: {OPENVINO} (opening: no such backend)" in table


def test_the_page_has_a_place_for_it(log, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    measured = control.measure(repeats=1, threads=1)
    (tmp_path / "control-sd15.json").write_text(json.dumps(measured))
    page = next(page for page in report.PAGES if page.name == "control.md")
    assert control.control_table(measured) in report.pages()[page]


def test_a_contender_that_is_none(log, capsys):
    assert main(["control", "--only", "TensorFlow"]) == 2
    assert "no contender is called TensorFlow; there are latentrt," in capsys.readouterr().err
    assert not log


@pytest.fixture
def scenario(place, monkeypatch):
    """Return a request of a small model whose nets and graphs are in the cache."""
    monkeypatch.setenv("LATENTRT_CACHE", str(place))
    small, file, graphs = write_small("sd1", place)
    monkeypatch.setattr(Scenario, "model", lambda scenario: file)
    nets = {}
    for seed, name in enumerate(NETS):
        folder = place / "benchmarks" / f"sd15-{name}"
        nets[name] = write_control_net(small_control_net(small, seed), folder)
    trace_control_graphs(Pipeline.load(file, graphs=graphs, controls=nets), graphs)
    return Scenario.of("sd15-64-x2")


def test_diffusers_computes_the_same(scenario):
    ours, theirs = (CONTENDERS[name].open(scenario, 1) for name in (REFERENCE, EAGER))
    steps = {part: ours[part]() for part in (control.PLAIN, ONE, TWO)}
    for part, found in steps.items():
        assert found.shape == (2, 4, 8, 8)
        assert relative_error(theirs[part](), found) <= PARITY_RTOL
    for part, other in ((ONE, control.PLAIN), (TWO, ONE)):
        assert relative_error(steps[part], steps[other]) > 0.01
    assert ours[HINT]().shape == (1, 64, 8, 8)
    assert hint_picture(scenario).shape == (1, 3, 64, 64)


def test_operations_are_those_of_diffusers_without_guidance(scenario):
    """With it the project computes what comes before the first text once for both texts."""
    scenario = replace(scenario, guidance_scale=1.0)
    counted, theirs = control_flops(scenario), CONTENDERS[EAGER].open(scenario, 1)
    for part, nets in ((control.PLAIN, 0), (ONE, 1), (TWO, 2)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            theirs[part]()
        expected = counted[part] + nets * counted[HINT]  # in every step
        assert counter.get_total_flops() == pytest.approx(expected, rel=FLOPS_RTOL)


def test_a_net_is_written_as_both_read_it(tmp_path):
    unet = SMALL["sd1"].configs["unet"]
    config = control_net_of(unet)
    tensors = random_tensors(config, np.random.default_rng(0).standard_normal(2**16, np.float32))
    diffusers_folder.write_control_net(config, tensors, tmp_path)
    found, weights = open_control_net(tmp_path, unet)
    assert found == config
    theirs = ControlNetModel.from_pretrained(tmp_path).state_dict()
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name], tensor)
        assert np.array_equal(theirs[name], tensor)


def test_the_graphs_of_the_measured_model_ship():
    for part in ("control", "control_hint"):
        assert find_graph(part, control_net_of(SD1), "float32", [GRAPHS], GRAPHS).weights
