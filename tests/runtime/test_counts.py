"""What a picture costs in counts, which no machine changes: a rise must be meant."""

import tracemalloc
from collections import Counter

import onnx
import pytest

from benchmarks.flops import count
from benchmarks.scenarios import SCENARIOS, engine_inputs
from engine.backends.settings import BackendSettings
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline, Request

MODEL = Model.open(find_model("pictogram"))
STEPS = 6
NODES = {
    "text_encoder": 90,
    "step": 561,
    "step_shallow": 168,
    "vae_decoder": 111,
    "vae_encoder": 81,
}
STEP_FLOPS = 1_927_357_952  # guided, 128 x 128
LOOP_BYTES = 8192  # that Python and numpy may take at once between two calls of the UNet


class Counting:
    """An engine that is only counted, and gives the same arrays again and again."""

    def __init__(self, engine):
        self.engine, self.calls, self.inputs, self.outputs = engine, 0, [], None

    def run(self, inputs):
        self.calls += 1
        self.inputs.append(dict(inputs))
        if self.outputs is None:
            self.outputs = self.engine.run(inputs)
        return self.outputs


@pytest.fixture
def counted():
    """Return a pipeline and the calls of its engines."""
    pipeline = Pipeline.load(settings=BackendSettings(threads=1))
    for part in ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder"):
        pipeline.engines.opened[part] = Counting(pipeline.engine(part))
    return pipeline


def calls(pipeline):
    return {part: engine.calls for part, engine in pipeline.engines.opened.items() if engine.calls}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"text_encoder": 1, "step": STEPS, "vae_decoder": 1}),
        ({"guidance_scale": 1.0}, {"text_encoder": 1, "step": STEPS, "vae_decoder": 1}),
        ({"num_images_per_prompt": 3}, {"text_encoder": 1, "step": STEPS, "vae_decoder": 1}),
        ({"sampler": "heun"}, {"text_encoder": 1, "step": 2 * STEPS - 1, "vae_decoder": 1}),
        (
            {"cache_interval": 3},
            {"text_encoder": 1, "step": 2, "step_shallow": 4, "vae_decoder": 1},
        ),
    ],
    ids=["plain", "unguided", "batch", "heun", "cached"],
)
def test_calls_of_engines(counted, options, expected):
    counted("a red apple", seed=1, **{"num_inference_steps": STEPS, "sampler": "ddim", **options})
    assert calls(counted) == expected


def test_rows_of_the_batch(counted):
    options = {"num_inference_steps": STEPS, "seed": 1, "sampler": "ddim"}
    counted("a", guidance_interval=(0.0, 0.5), **options)
    rows = [inputs["context"].shape[0] for inputs in counted.engines.opened["step"].inputs]
    assert rows == [2] * 3 + [1] * 3, "outside the interval the batch is halved"


def test_nothing_is_copied_between_two_calls(counted):
    counted("a red apple", seed=1, num_inference_steps=STEPS, sampler="ddim")
    engine = counted.engines.opened["step"]
    for inputs in engine.inputs[1:]:
        assert inputs["registers"] is engine.outputs["next_registers"]
    constant = {"context", "guidance_rescale", "mask", "noise"}
    for name in constant:
        assert len({id(inputs[name]) for inputs in engine.inputs}) == 1, name
    moved = Counter()
    for inputs in engine.inputs:
        moved.update({n: a.nbytes for n, a in inputs.items() if n not in {*constant, "registers"}})
    assert sum(moved.values()) <= 64 * STEPS, "what is told anew each step is a few numbers"


def test_allocations_in_the_loop(counted):
    plan = counted.plan(Request(prompt="a", num_inference_steps=STEPS, seed=1, sampler="ddim"))
    steps = counted.denoise(plan)
    next(steps)
    tracemalloc.start()
    try:
        for _ in range(STEPS - 2):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            next(steps)
            assert tracemalloc.get_traced_memory()[1] - before < LOOP_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("part", NODES)
def test_nodes_of_graphs(part):
    graph = find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)
    assert len(onnx.load_model_from_string(graph.data()).graph.node) <= NODES[part]


def test_operations_of_a_step():
    graph = find_graph("step", MODEL.unet, "float32", graph_folders(), MODEL.path)
    shapes = {k: v.shape for k, v in engine_inputs(SCENARIOS["pictogram"], MODEL)["step"].items()}
    assert count(graph.data(), shapes) == STEP_FLOPS
