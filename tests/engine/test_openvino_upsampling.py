from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.openvino_engines import counted, opened, operations, step_inputs
from tests.parity import relative_error
from tests.tolerances import INT8_RTOL, OPENVINO_RTOL, PARITY_RTOL

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from engine.openvino_upsampling import merged_kernel

MERGED, ENLARGING = "Deconvolution", "Interpolate"
IN_DECODER, IN_UNET = 3, 2  # the enlargements of the model that ships


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_the_kernel_is_that_of_both_operations(size):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, *size, generator=generator)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    expected = F.conv2d(F.interpolate(sample, scale_factor=2.0, mode="nearest"), weight, padding=1)
    kernel = torch.from_numpy(merged_kernel(weight.numpy())).transpose(0, 1)
    actual = F.conv_transpose2d(sample, kernel, stride=2, padding=1)
    assert relative_error(actual, expected) < PARITY_RTOL


def latents(height, width):
    return {"latents": np.random.default_rng(0).standard_normal((1, 4, height, width), np.float32)}


def test_a_decoder_enlarges_as_it_convolves_at_any_size():
    engine, reference = opened("vae_decoder", "openvino"), opened("vae_decoder", "cpu")
    for size in ((4, 4), (3, 5)):  # compiled for its size, then for any
        actual, expected = (e.run(latents(*size))["pixels"] for e in (engine, reference))
        assert np.abs(actual.astype(int) - expected).max() <= 1
        found = counted(engine)
        assert (found[MERGED], found[ENLARGING]) == (IN_DECODER, 0)


@pytest.mark.parametrize(
    ("size", "merged"), [((8, 16), IN_UNET), ((6, 8), 1), ((7, 8), 1), ((8, 5), 0)]
)
def test_a_unet_does_where_every_level_is_twice_the_next(size, merged):
    given = step_inputs(*size)
    engine, reference = opened("step", "openvino"), opened("step", "cpu")
    actual, expected = (e.run(given)["next_registers"] for e in (engine, reference))
    assert relative_error(torch.from_numpy(actual), torch.from_numpy(expected)) < OPENVINO_RTOL
    found = counted(engine)
    assert (found[MERGED], found[ENLARGING]) == (merged, IN_UNET - merged)


def test_a_unet_for_any_size_enlarges_first():
    engine = opened("step", "openvino")
    engine.run(step_inputs(8, 8))
    assert counted(engine)[MERGED] == IN_UNET
    engine.run(step_inputs(8, 16))
    found = counted(engine)
    assert (found[MERGED], found[ENLARGING]) == (0, IN_UNET)


def test_int8_where_the_ranges_are_known():
    name, given = "up_blocks.1.upsamplers.0.conv.weight", step_inputs(8, 8)
    engines = [
        opened("step", "cpu"),
        opened("step", "openvino", "bfloat16"),
        opened("step", "openvino", "int8", {name: (-20.0, 20.0)}),
    ]
    exact, plain, rounded = (torch.from_numpy(e.run(given)["next_registers"]) for e in engines)
    assert relative_error(rounded, exact) < INT8_RTOL
    assert relative_error(rounded, plain) > 0
    merged = [how for kind, how in operations(engines[-1]) if kind == MERGED]
    assert [how.endswith("i8") for how in merged].count(True) == 1
