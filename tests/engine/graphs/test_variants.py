"""Variants of the graphs that ship: whole graphs, with more inputs and the same weights."""

import onnx
import pytest

from engine.checkpoints.families.sd import SD1
from engine.checkpoints.families.xl import XL
from engine.errors import GraphError
from engine.graphs.graph import find_graph
from engine.graphs.guidance import GUIDED_INPUTS, PERTURBED_INPUTS, perturbed
from engine.graphs.variants import Variant
from engine.model import Model, find_model
from engine.shipped import GRAPHS

MODEL = Model.open(find_model("pictogram"))
CASES = [
    ("step", SD1, "float32", 1),
    ("step", SD1, "float16", 1),
    ("step_controlled", SD1, "float32", 1),
    ("step", XL, "float32", 10),
    ("step_shrunk", MODEL.unet, "float32", 1),
]


def found(part, config, precision="float32"):
    return find_graph(part, config, precision, [GRAPHS], "the published model")


def check(graph):
    """Every value is made before it is read, and once."""
    model = onnx.load_model_from_string(graph.data())
    made = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    assert len(made) == 1 + len(model.graph.input) + len(model.graph.initializer)
    for node in model.graph.node:
        assert set(node.input) <= made, node.name
        assert made.isdisjoint(set(node.output) - {""}), node.name
        made |= set(node.output)
    assert {value.name for value in model.graph.output} <= made
    assert tuple(value.name for value in model.graph.input) == graph.inputs
    return model


@pytest.mark.parametrize(("part", "config", "precision", "layers"), CASES)
def test_steps_of_published_models_can_all_be_asked_for(part, config, precision, layers):
    plain = found(part, config, precision)
    variant = Variant(seamless="both", perturbed=True, guided=True).of(plain)
    assert variant.inputs == (*plain.inputs, *PERTURBED_INPUTS, *GUIDED_INPUTS)
    assert variant.weights == plain.weights
    model = check(variant)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Where") - before(plain, "Where") == layers, (
        "one for each layer of the middle"
    )
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    pads = [
        pad for node in convolutions for a in node.attribute if a.name == "pads" for pad in a.ints
    ]
    assert not any(pads)
    assert plain.content is None, "the plain graph is what it was"


def before(graph, kind):
    model = onnx.load_model_from_string(graph.data())
    return sum(node.op_type == kind for node in model.graph.node)


@pytest.mark.parametrize("along", ["x", "y"])
def test_one_axis_keeps_the_padding_of_the_other(along):
    model = check(Variant(seamless=along).of(found("vae_encoder", MODEL.vae)))
    kept = {"x": (0, 2), "y": (1, 3)}[along]
    padded = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            (pads,) = [tuple(a.ints) for a in node.attribute if a.name == "pads"]
            assert not any(pad for i, pad in enumerate(pads) if i not in kept)
            padded += any(pads)
    assert padded > 5


def test_a_shallow_step_takes_guidance_alone():
    graph = Variant(guided=True).of(found("step_shallow", SD1))
    assert graph.inputs[-len(GUIDED_INPUTS) :] == tuple(GUIDED_INPUTS)
    check(graph)
    with pytest.raises(GraphError, match="there is no attention to perturb"):
        perturbed(found("step_shallow", SD1).data())


def test_another_graph_is_refused_in_a_sentence():
    with pytest.raises(GraphError, match="make it anew with"):
        Variant(guided=True).of(found("vae_decoder", MODEL.vae))
