import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import count
from benchmarks.scenarios import SCENARIOS, engine_inputs
from engine.checkpoints.families.sd import SD1
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model
from export.tracing import build_module
from tests.support.tolerances import FLOPS_RTOL


def graph_of(nodes, inputs, outputs=("y",)):
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in inputs.items()
    ]
    last = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "small", values, last)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return model.SerializeToString()


def test_a_convolution():
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1], group=2)
    graph = graph_of([node], {"x": ["B", 4, "h", "w"], "w": [6, 2, 3, 3]})
    # 2 pictures, 6 channels of 5 x 4 pixels, each of 2 channels' 3 x 3
    assert count(graph, {"x": (2, 4, 10, 8)}) == 2 * (2 * 6 * 5 * 4) * (2 * 3 * 3)


def test_products_of_matrices_and_what_is_not_counted():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "v"], ["y"], transA=1),
    ]
    graph = graph_of(nodes, {"x": ["n", 3], "w": [3, 7], "v": ["n", 5]})
    assert count(graph, {"x": (11, 3), "v": (11, 5)}) == 2 * 11 * 3 * 7 + 2 * 7 * 11 * 5


def test_attention_between_texts_of_two_lengths():
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    graph = graph_of([node], {"q": [2, 3, "n", 8], "k": [2, 3, "m", 8], "v": [2, 3, "m", 4]})
    shapes = {"q": (2, 3, 9, 8), "k": (2, 3, 5, 8), "v": (2, 3, 5, 4)}
    assert count(graph, shapes) == 2 * (2 * 3) * (9 * 5) * (8 + 4)


def test_attention_of_three_axes_is_refused():
    attention = helper.make_node("Attention", ["q", "q", "q"], ["y"], q_num_heads=2, kv_num_heads=2)
    with pytest.raises(ValueError, match="of 3 axes"):
        count(graph_of([attention], {"q": [2, "n", 8]}), {"q": (2, 9, 8)})


def test_an_input_without_a_shape_is_refused():
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(ValueError, match="'x' has free sizes"):
        count(graph_of([node], {"x": ["n", 3], "w": [3, 7]}), {})


def test_a_shape_that_the_inputs_do_not_determine_is_refused():
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "numbers"], ["y"]),
    ]
    with pytest.raises(ValueError, match="not known"):
        count(graph_of(nodes, {"x": [2, 2]}), {})


@pytest.mark.parametrize("part", ["text_encoder", "step", "vae_decoder"])
def test_the_shipped_models_parts_against_torch(part):
    scenario = SCENARIOS["pictogram"]
    model = Model.open(scenario.model())
    inputs = engine_inputs(scenario, model)[part]
    graph = find_graph(part, model.config(part), "float32", graph_folders(), model.path)
    counted = count(graph.data(), {name: array.shape for name, array in inputs.items()})
    module = build_module(part, model.config(part))
    # Taken apart into products, attention is seen by torch's counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    assert counted == pytest.approx(counter.get_total_flops(), rel=FLOPS_RTOL)


def test_a_guided_step_of_stable_diffusion_at_512_pixels():
    latents = np.empty((1, 4, 64, 64), np.float32)
    shapes = {
        "registers": (1, *latents.shape),
        "matrices": (1, 1, 3),
        "timestep": (1,),
        "input_scale": (1,),
        "context": (2, 1, 77, 768),
        "guidance": (2, 1, 1, 1, 1),
        "guidance_rescale": (1,),
        "noise": latents.shape,
        "mask": (1, 1, 64, 64),
        "outside": (1, 3),
    }
    graph = find_graph("step", SD1, "float32", graph_folders(), "SD 1.5")
    alike = 0.041  # what both texts have in common: 1.607 where it is computed for each
    assert count(graph.data(), shapes) / 1e12 == pytest.approx(1.607 - alike, abs=0.001)
