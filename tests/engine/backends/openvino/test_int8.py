import json

import numpy as np
import pytest
import torch

from engine.backends.openvino.int8 import (
    find_ranges,
    input_range,
    is_quantized,
    quantize,
    ranges_name,
    write_ranges,
)
from engine.errors import BackendError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 3, 3)])
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_weights_are_torchs_per_channel_integers(shape, stored):
    weight = RNG.normal(size=shape) * 10.0 ** RNG.integers(-3, 3, (8, *[1] * (len(shape) - 1)))
    weight = weight.astype(stored)
    quantized = quantize(weight)
    assert quantized.values.dtype == np.int8
    assert quantized.scales.shape == (8, *[1] * (len(shape) - 1))
    wide, scales = torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(quantized.scales)
    expected = torch.fake_quantize_per_channel_affine(
        wide, scales.ravel(), torch.zeros(8, dtype=torch.int32), 0, -127, 127
    )
    np.testing.assert_array_equal(quantized.values * quantized.scales, expected.numpy())
    assert (np.abs(quantized.values).reshape(8, -1).max(axis=1) == 127).all()
    off = np.abs(quantized.values * quantized.scales - weight.astype(np.float32))
    assert (off <= quantized.scales * 0.5001).all()


def test_a_channel_of_zeros_stays_one():
    quantized = quantize(np.zeros((2, 3), np.float32))
    assert not quantized.values.any()
    assert np.isfinite(quantized.scales).all()


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(
    ("low_seen", "high_seen"), [(-0.28, 9.0), (-3.0, 2.5), (-4.0, 0.5), (0.5, 2.0), (0.0, 0.0)]
)
def test_a_range_holds_what_was_seen_and_0_exactly(low_seen, high_seen, shifted):
    low, high = input_range(low_seen, high_seen, shifted=shifted)
    step = (high - low) / 255
    assert low <= low_seen + step / 2
    assert high >= high_seen - step / 2
    assert (-low / step) == pytest.approx(round(-low / step), abs=1e-9), "0 is one of the levels"


def test_one_sided_inputs_use_all_levels_where_the_layer_can_shift_them():
    low, high = input_range(-0.28, 9.0, shifted=True)
    assert high - low == pytest.approx(9.28, rel=0.01)
    low, high = input_range(-0.28, 9.0, shifted=False)
    assert (low, high) == (pytest.approx(-9 * 128 / 127), 9.0)
    low, high = input_range(-9.0, 8.0, shifted=True)
    assert high == 9.0, "two-sided inputs lie around 0 either way"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", True),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight", True),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight", True),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", False),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", False),
        ("time_embedding.linear_1.weight", False),
        ("conv_in.weight", False),
        ("conv_out.weight", False),
        ("down_blocks.0.resnets.0.conv1.bias", False),
        ("up_blocks.0.upsamplers.0.conv.weight", False),
        ("decoder.up_blocks.0.upsamplers.0.conv.weight", False),
        ("decoder.up_blocks.2.resnets.0.conv_shortcut.weight", False),
        ("decoder.up_blocks.2.resnets.0.conv2.weight", True),
        ("decoder.conv_in.weight", False),
        ("post_quant_conv.weight", False),
    ],
)
def test_which_layers(name, whole):
    assert is_quantized(name) is whole


def test_the_name_tells_checkpoints_apart():
    weights = {"a": RNG.normal(size=(4, 4)), "b": RNG.normal(size=4), "c": np.array(1.0)}
    name = ranges_name("key", weights)
    assert name == ranges_name("key", dict(reversed(weights.items())))
    assert name != ranges_name("other", weights)
    for changed in weights:
        other = {**weights, changed: weights[changed] + 1}
        assert ranges_name("key", other) != name


def test_ranges_are_written_and_found(tmp_path):
    ranges = {"a.weight": (-1.5, 2.0)}
    write_ranges(tmp_path / "new" / "r.json", ranges)
    assert find_ranges("r.json", [tmp_path, tmp_path / "new"]) == ranges
    assert find_ranges("other.json", [tmp_path, tmp_path / "new"]) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": [1, "x"]}', '{"a": [0, NaN]}', '{"a": [1, 2, 3]}', "\xff"]
)
def test_a_damaged_file_of_ranges(tmp_path, text):
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        BackendError, match=r"r\.json holds no ranges for int8 .*delete it"
    ) as caught:
        find_ranges("r.json", [tmp_path])
    assert "\n" not in str(caught.value)


def test_ranges_are_json(tmp_path):
    write_ranges(tmp_path / "r.json", {"a": (0.0, 1.0)})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [0.0, 1.0]}
