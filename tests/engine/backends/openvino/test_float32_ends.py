from importlib.util import find_spec

import numpy as np
import pytest

from tests.support.openvino_engines import MODEL, counted, opened, step_inputs

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from engine.backends.openvino.float32_ends import UNREAD, _last_products, keep_ends
from engine.backends.openvino.library import CPU, capabilities, import_library
from engine.checkpoints.families.sd import SD1
from engine.checkpoints.families.xl import XL
from engine.graphs.graph import find_graph, graph_folders
from engine.graphs.onnx_bytes import weights_as_inputs

if "BF16" not in capabilities():
    pytest.skip("no bfloat16 arithmetic", allow_module_level=True)

LIBRARY = import_library()
OPS = LIBRARY.opset13
WIDTH = 64
ANGLE_RTOL = 5e-3  # of what waves of exact angles give, rounded once, and a product with weights
SETTINGS = {"INFERENCE_PRECISION_HINT": "bf16"}


@pytest.mark.parametrize("ranges", [None, {"mid_block.resnets.0.conv1.weight": (-8.0, 8.0)}])
def test_the_sampler_takes_what_it_is_given(ranges):
    """Registers and noise pass through a step as they are."""
    given = step_inputs(8, 8)
    noise = given["noise"] = np.random.default_rng(1).standard_normal((1, 8, 8, 8), np.float32)
    engine = opened("step", "openvino", "int8" if ranges else "bfloat16", ranges)
    for row, expected in (((1, 0, 0), given["registers"][0]), ((0, 0, 1), noise)):
        given["matrices"] = np.float32(row).reshape(1, 1, 3)
        outputs = engine.run(given)
        np.testing.assert_array_equal(outputs["next_registers"][0], expected.reshape(1, 8, 8, 8))
    assert outputs.keys() == {"next_registers", "deep"}
    assert counted(engine)["MatMul"] == 0


def test_two_registers_are_told_apart():
    """As a product of matrices: (B, r, r + 2) times (B, r + 2, C h w)."""
    rng = np.random.default_rng(2)
    given = step_inputs(8, 8)
    given["registers"] = rng.standard_normal((1, 2, 8, 8, 8), np.float32)
    given["noise"] = rng.standard_normal((1, 8, 8, 8), np.float32)
    matrix = np.float32([[0.25, 2, 0, -3], [1, -0.5, 0, 0.125]])
    given["matrices"] = matrix[None]
    given["outside"] = np.zeros((1, 4), np.float32)
    found = opened("step", "openvino", "bfloat16").run(given)["next_registers"]
    x, h = given["registers"][0]
    given_without_output = np.stack([x, h, np.zeros_like(x), given["noise"][0]])
    expected = np.tensordot(matrix, given_without_output, axes=1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_float32_and_a_decoder_stay_as_they_are():
    given = step_inputs(8, 8)
    engine = opened("step", "openvino")
    assert engine.run(given).keys() == {"next_registers", "deep"}
    assert counted(engine)["MatMul"] == 1, "the sampler's"
    decoder = opened("vae_decoder", "openvino", "bfloat16")
    assert decoder.run({"latents": np.zeros((1, 8, 4, 4), np.float32)}).keys() == {"pixels"}


def waves(weight):
    """A model of a timestep's waves and a product with weights, as every UNet begins."""
    timestep = OPS.parameter([1], np.float32, name="timestep")
    frequencies = np.exp(-np.log(10000) * np.arange(WIDTH / 2) / (WIDTH / 2)).astype(np.float32)
    angles = OPS.multiply(OPS.unsqueeze(timestep, [1]), OPS.constant(frequencies[None]))
    both = OPS.concat([OPS.cos(angles), OPS.sin(angles)], 1)
    result = OPS.result(OPS.matmul(both, OPS.constant(weight), False, False))
    result.output(0).set_names({"embedding"})
    return LIBRARY.Model([result], [timestep], "waves")


def embedded(timestep, settings, kept):
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    model = waves(weight)
    if kept:
        keep_ends(LIBRARY, model, ())
    compiled = LIBRARY.Core().compile_model(model, CPU, settings)
    results = compiled({"timestep": np.float32([timestep])})
    names = [output.get_any_name() for output in compiled.outputs]
    assert len([name for name in names if name.startswith(UNREAD)]) == (2 if kept else 0)
    return results[0]


@pytest.mark.parametrize("timestep", [1, 77, 500, 501, 999])
def test_angles_are_exact(timestep):
    expected = embedded(timestep, {"INFERENCE_PRECISION_HINT": "f32"}, kept=False)
    norm = np.linalg.norm(expected)
    kept, rounded = (
        np.linalg.norm(embedded(timestep, SETTINGS, kept=k) - expected) / norm
        for k in (True, False)
    )
    assert kept < ANGLE_RTOL
    if timestep > 1:
        assert rounded > 2 * kept, "what this is for"


def product(left, right, layer=False, turned=False):
    """A model that ends in a product of two inputs, or in a convolution behind it."""
    given = [OPS.parameter(shape, np.float32, name=n) for shape, n in ((left, "a"), (right, "b"))]
    value = OPS.matmul(*given, False, turned)
    if layer:
        kernel = np.ones((2, value.get_output_shape(0)[1], 1), np.float32)
        value = OPS.convolution(value, OPS.constant(kernel), [1], [0], [0], [1])
    return LIBRARY.Model([OPS.result(value)], given, "product")


@pytest.mark.parametrize(
    ("model", "weights", "left"),
    [
        (product([1, 2, 4], [1, 4, 9]), (), 0),
        (product([1, 2, 4], [1, 4, 9]), ("b",), 1),
        (product([1, 2, 4], [1, 4, 9], layer=True), (), 1),
        (product([1, 2, 4], [1, 9, 4], turned=True), (), 1),
        (product([2, 4], [4, 9]), (), 1),
        (product([1, 1, 2, 4], [1, 1, 4, 9]), (), 1),
    ],
    ids=["last", "with a weight", "before a layer", "turned", "of matrices", "of four dimensions"],
)
def test_which_products_become_sums(model, weights, left):
    keep_ends(LIBRARY, model, weights)
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    assert kinds.count("MatMul") == left
    assert kinds.count("ReduceSum") == 1 - left


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("step", MODEL.unet),
        ("step_shallow", MODEL.unet),
        ("step", SD1),
        ("step_controlled", SD1),
        ("step", XL),
    ],
)
def test_a_unet_has_one_such_product(part, config):
    graph = find_graph(part, config, "float32", graph_folders(), MODEL.path)
    model = LIBRARY.Core().read_model(weights_as_inputs(graph.data()))
    assert len([*_last_products(model, graph.weights)]) == 1


def test_neighbours_of_one_batch_size_change_nothing():
    """A fixed batch size is all that it takes for a picture to have its bits."""
    rng = np.random.default_rng(3)
    one, other, third = (
        step_inputs(8, 8) | {"registers": rng.standard_normal((1, 1, 8, 8, 8), np.float32)}
        for _ in range(3)
    )

    def beside(*given):
        rows = {
            name: np.concatenate([each[name] for each in given], axis=int(name == "context"))
            for name in one
            if name != "guidance"
        }
        rows["guidance"] = np.repeat(one["guidance"], len(given), axis=1)
        return engine.run(rows)["next_registers"]

    engine = opened("step", "openvino", "bfloat16")
    first = beside(one, other)[0]
    np.testing.assert_array_equal(beside(one, third)[0], first)
    np.testing.assert_array_equal(beside(third, one)[1], first)
