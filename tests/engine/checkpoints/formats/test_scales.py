import json

import numpy as np
import pytest

from engine.checkpoints.component import left_over
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.formats.float8 import read_float8
from tests.support.bad_numbers import safetensors

CODES = np.random.default_rng(0).integers(0, 0x7F, (8, 12), np.uint8)
PLAIN = read_float8("F8_E4M3", CODES).astype(np.float32)
WEIGHT = ("F8_E4M3", CODES.shape, CODES.tobytes())
# What a program calls a weight and its scale.
NAMES = {
    "ComfyUI": ("layer.weight", "layer.scale_weight"),
    "ComfyUI since 2025": ("layer.weight", "layer.weight_scale"),
    "DeepSeek": ("layer.weight", "layer.weight_scale_inv"),
    "a fused projection": ("attn.in_proj_weight", "attn.in_proj_weight_scale"),
    "a scale of the weight": ("layer.weight", "layer.weight.scale"),
    "optimum-quanto": ("layer.weight._data", "layer.weight._scale"),
}


def opened(tmp_path, tensors, **metadata):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors, **metadata))
    return open_weights(path)


def stored(array):
    kinds = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}
    return kinds[array.dtype.str[1:]], array.shape, array.tobytes()


@pytest.mark.parametrize("program", NAMES)
def test_a_scale_is_used_whatever_it_is_called(tmp_path, program):
    name, scale = NAMES[program]
    number = np.array([0.0123], np.float32)
    weights = opened(tmp_path, {name: WEIGHT, scale: stored(number)})
    assert list(weights) == [name.removesuffix("._data")]
    (array,) = weights.values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, PLAIN * number)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (1, 1), (8,), (8, 1), (8, 1, 1), (1, 12), (2, 3), (4, 1), (8, 3, 1), (8, 12)],
)
def test_a_scale_is_of_the_weight_its_rows_or_its_blocks(tmp_path, shape):
    scale = np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)
    whole = scale.reshape(shape[:2] + (1,) * (2 - len(shape[:2])))
    whole = np.repeat(np.repeat(whole, 8 // whole.shape[0], 0), 12 // whole.shape[1], 1)
    weights = opened(tmp_path, {"layer.weight": WEIGHT, "layer.weight_scale": stored(scale)})
    np.testing.assert_array_equal(weights["layer.weight"], PLAIN * whole)


def test_a_convolution_has_a_scale_for_each_of_its_outputs(tmp_path):
    scale = np.arange(1, 9, dtype=np.float32)
    convolution = ("F8_E4M3", (8, 3, 2, 2), CODES.tobytes())
    weights = opened(tmp_path, {"conv.weight": convolution, "conv.scale_weight": stored(scale)})
    expected = PLAIN.reshape(8, 3, 2, 2) * scale.reshape(8, 1, 1, 1)
    np.testing.assert_array_equal(weights["conv.weight"], expected)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_other_numbers_are_scaled_too(tmp_path, dtype):
    numbers = np.arange(-48, 48).reshape(8, 12).astype(dtype)
    scale = np.array(0.25, np.float16)
    held = {"layer.weight": stored(numbers), "layer.weight_scale": stored(scale)}
    weights = opened(tmp_path, held)
    assert weights.tensors["layer.weight"].is_float
    np.testing.assert_array_equal(weights["layer.weight"], numbers.astype(np.float32) * 0.25)


def test_whole_numbers_without_a_scale_are_no_weights(tmp_path):
    weights = opened(tmp_path, {"layer.weight": stored(np.ones(3, np.int8))})
    assert not weights.tensors["layer.weight"].is_float


def test_marks_and_the_ranges_of_inputs_are_known_to_be_unused(tmp_path):
    one = stored(np.ones(1, np.float32))
    weights = opened(
        tmp_path,
        {
            "model.diffusion_model.layer.weight": WEIGHT,
            "model.diffusion_model.layer.scale_weight": one,
            "model.diffusion_model.layer.scale_input": one,
            "model.diffusion_model.scaled_fp8": ("F8_E4M3", (2,), bytes(2)),
            "scaled_fp8": ("F8_E4M3", (0,), b""),
            "second.weight": WEIGHT,
            "second.weight_scale": one,
            "second.input_scale": one,
            "second.comfy_quant": stored(
                np.frombuffer(
                    b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}', "u1"
                )
            ),
            "third.weight": stored(np.ones((2, 2), np.float32)),
        },
        _quantization_metadata=json.dumps({"layers": {"second": {"format": "float8_e4m3fn"}}}),
    )
    used = {name for name in weights if name.endswith(".weight")}
    assert len(used) == 3
    assert left_over(weights, used) == []


def test_names_that_end_like_scales_are_left_alone(tmp_path):
    one = stored(np.ones(1, np.float32))
    names = ["a.dora_scale", "logit_scale", "b.weight_scale", "c.scale_weight", "c.bias"]
    weights = opened(tmp_path, dict.fromkeys(names, one))
    assert list(weights) == names


def test_a_scale_may_be_in_another_shard(tmp_path):
    files = {
        "model-1.safetensors": {"layer.weight": WEIGHT},
        "model-2.safetensors": {"layer.scale_weight": stored(np.full(1, 2, np.float32))},
    }
    weight_map = {}
    for file, tensors in files.items():
        (tmp_path / file).write_bytes(safetensors(tensors))
        weight_map |= dict.fromkeys(tensors, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    weights = open_weights(index)
    assert list(weights) == ["layer.weight"]
    np.testing.assert_array_equal(weights["layer.weight"], PLAIN * 2)
