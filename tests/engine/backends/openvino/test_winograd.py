from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.openvino_engines import counted, opened, operations, step_inputs
from tests.support.parity import relative_error
from tests.support.tolerances import BFLOAT16_RTOL, OPENVINO_RTOL, PARITY_RTOL, TILES_BFLOAT16_RTOL

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

import openvino

from engine.backends.openvino import winograd as openvino_winograd
from engine.backends.openvino.winograd import ENLARGED, PLAIN, transform_convolutions

ENLARGING, IN_TILES = "Interpolate", "DepthToSpace"
IN_DECODER, IN_UNET = 3, 2  # the enlargements of the model that ships
CHANNELS = 256
ops = openvino.opset13


@pytest.fixture
def every_size(monkeypatch):
    """Let small convolutions be computed in tiles, as large ones are."""
    monkeypatch.setattr(openvino_winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(openvino_winograd, "MIN_POSITIONS", 1)


def convolution(size, channels=(3, 4), dtype=np.float32, enlarged=False, **changed):
    """A model of one convolution of random weights, its input, and torch's output."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels[1], channels[0], 3, 3), np.float32).astype(dtype)
    sample = rng.standard_normal((2, channels[0], *size), np.float32)
    given = value = ops.parameter(openvino.PartialShape([-1, *sample.shape[1:]]), np.float32)
    expected = torch.from_numpy(sample)
    if enlarged:
        scales = np.array([1, 1, 2, 2], np.float32)
        value = ops.interpolate(
            value, scales, "nearest", "scales", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
        expected = F.interpolate(expected, scale_factor=2.0, mode="nearest")
    settings = {"strides": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]}
    constant = ops.convert(ops.constant(weight), np.float32) if dtype == np.float16 else weight
    convolved = ops.convolution(value, constant, **settings | changed)
    wide = torch.from_numpy(weight.astype(np.float32))
    if not changed:
        expected = F.conv2d(expected, wide, padding=1)
    return openvino.Model([ops.result(convolved)], [given], "one"), sample, expected


def kinds(model):
    return [operation.get_type_name() for operation in model.get_ordered_ops()]


def computed(model, sample):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([sample])[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [(2, 2), (2, 8), (6, 4)])
def test_a_convolution_takes_sixteen_products(every_size, size, dtype):
    model, sample, expected = convolution(size, dtype=dtype)
    assert transform_convolutions(openvino, model, np.float32)
    assert kinds(model).count("Convolution") == 16
    assert relative_error(computed(model, sample), expected) < PARITY_RTOL


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_behind_an_enlargement_it_takes_nine_at_any_size(size):
    model, sample, expected = convolution(size, enlarged=True)
    model.reshape([-1, 3, -1, -1])
    assert transform_convolutions(openvino, model, np.float32)
    assert (kinds(model).count("Convolution"), kinds(model).count(ENLARGING)) == (9, 0)
    assert relative_error(computed(model, sample), expected) < PARITY_RTOL


def test_new_weights_can_be_of_float16(every_size):
    model, sample, expected = convolution((4, 4))
    transform_convolutions(openvino, model, np.float16)
    weights = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    stored = {op.input_value(1).get_node().input_value(0).get_element_type() for op in weights}
    assert stored == {openvino.Type.f16}
    assert relative_error(computed(model, sample), expected) < BFLOAT16_RTOL


@pytest.mark.parametrize(
    "other",
    [
        {"size": (3, 4)},
        {"size": (4, 5)},
        {"size": (4, 4), "strides": [2, 2]},
        {"size": (4, 4), "pads_begin": [0, 0], "pads_end": [2, 2]},
        {"size": (4, 4), "dilations": [2, 2], "pads_begin": [2, 2], "pads_end": [2, 2]},
    ],
    ids=["odd height", "odd width", "stride", "padding", "dilation"],
)
def test_others_stay(every_size, other):
    model, *_ = convolution(**other)
    assert transform_convolutions(openvino, model, np.float32) is None
    assert kinds(model).count("Convolution") == 1


@pytest.mark.parametrize(
    ("size", "channels", "changes"),
    [
        ((16, 16), (CHANNELS, CHANNELS), True),
        ((16, 14), (CHANNELS, CHANNELS), False),
        ((16, 16), (CHANNELS - 1, CHANNELS), False),
        ((16, 16), (CHANNELS, CHANNELS - 1), False),
    ],
)
def test_large_ones_alone_gain(size, channels, changes):
    model, *_ = convolution(size, channels)
    assert (transform_convolutions(openvino, model, np.float32) is not None) == changes


def test_sides_that_are_not_known_stay(every_size):
    model, *_ = convolution((4, 4))
    model.reshape([-1, 3, -1, 4])
    assert transform_convolutions(openvino, model, np.float32) is None


@pytest.mark.parametrize("tiling", [PLAIN, ENLARGED])
def test_the_first_number_of_a_tile_is_of_one_output_and_the_second_of_both(tiling):
    assert [*tiling.outputs[:, 0]] == [1, 0]
    assert [*tiling.outputs[:, 1]] == [1, 1], "sums begin with it"


def latents(height, width):
    return {"latents": np.random.default_rng(0).standard_normal((1, 8, height, width), np.float32)}


def test_a_decoder_of_any_size():
    engine, reference = opened("vae_decoder", "openvino"), opened("vae_decoder", "cpu")
    for size in ((4, 4), (3, 5)):  # compiled for its size, then for any
        actual, expected = (e.run(latents(*size))["pixels"] for e in (engine, reference))
        assert np.abs(actual.astype(int) - expected).max() <= 1
        found = counted(engine)
        assert (found[IN_TILES], found[ENLARGING]) == (IN_DECODER, 0)


@pytest.mark.parametrize(
    ("size", "in_tiles"), [((8, 16), IN_UNET), ((6, 8), 1), ((7, 8), 1), ((8, 5), 0)]
)
def test_a_unet_where_every_level_is_twice_the_next(size, in_tiles):
    given = step_inputs(*size)
    engine, reference = opened("step", "openvino"), opened("step", "cpu")
    actual, expected = (e.run(given)["next_registers"] for e in (engine, reference))
    assert relative_error(torch.from_numpy(actual), torch.from_numpy(expected)) < OPENVINO_RTOL
    found = counted(engine)
    assert (found[IN_TILES], found[ENLARGING]) == (in_tiles, IN_UNET - in_tiles)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_unet_in_tiles_all_over(every_size, precision):
    given = step_inputs(8, 8)
    engine, reference = opened("step", "openvino", precision), opened("step", "cpu")
    actual, expected = (e.run(given)["next_registers"] for e in (engine, reference))
    tolerance = {"float32": OPENVINO_RTOL, "bfloat16": TILES_BFLOAT16_RTOL}[precision]
    assert relative_error(torch.from_numpy(actual), torch.from_numpy(expected)) < tolerance
    assert counted(engine)[IN_TILES] > 10 * IN_UNET


def test_another_batch_keeps_the_tiles_and_another_size_does_not():
    engine, reference = opened("step", "openvino"), opened("step", "cpu")
    given = step_inputs(8, 8)
    unguided = given | {"context": given["context"][:1], "guidance": given["guidance"][:1]}
    for inputs, in_tiles in (
        (given, IN_UNET),
        (unguided, IN_UNET),
        (step_inputs(8, 16), 0),
        (given, 0),
    ):
        actual, expected = (e.run(inputs)["next_registers"] for e in (engine, reference))
        assert relative_error(torch.from_numpy(actual), torch.from_numpy(expected)) < OPENVINO_RTOL
        assert counted(engine)[IN_TILES] == in_tiles


def test_whole_numbers_stay(every_size):
    name, given = "mid_block.resnets.0.conv1.weight", step_inputs(8, 8)
    engine = opened("step", "openvino", "int8", {name: (-8.0, 8.0)})
    engine.run(given)
    rounded = [how for kind, how in operations(engine) if kind == "Convolution"]
    assert [how.lower().endswith("i8") for how in rounded].count(True) == 1
