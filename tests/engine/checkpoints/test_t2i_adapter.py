"""T2I-Adapters' files: both namings, full and light, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.families import FAMILIES
from engine.checkpoints.t2i_adapter import is_t2i_adapter, open_t2i_adapter
from engine.configs.t2i_adapter import T2IAdapterConfig, adapted_places
from engine.errors import ModelError

PUBLISHED = {name: FAMILIES[name].published["unet"][0] for name in ("sd1", "xl")}
SMALL = replace(PUBLISHED["sd1"], block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
WIDTHS = (8, 16, 32, 32)
FULL = T2IAdapterConfig(channels=WIDTHS)
LIGHT = T2IAdapterConfig(channels=WIDTHS, light=True, num_res_blocks=4)
# TencentARC's names of a light and a full adapter, by diffusers'.
ORIGINAL = {
    "adapter.conv_in.bias": "conv_in.bias",
    "adapter.body.0.resnets.1.block2.weight": "body.1.block2.weight",
    "adapter.body.2.in_conv.weight": "body.4.in_conv.weight",
    "adapter.body.2.downsample.weight": "body.4.down_opt.op.weight",
    "adapter.body.3.resnets.0.block1.bias": "body.6.block1.bias",
}
ORIGINAL_LIGHT = {
    "adapter.body.1.in_conv.weight": "body.1.in_conv.weight",
    "adapter.body.1.out_conv.bias": "body.1.out_conv.bias",
    "adapter.body.3.resnets.2.block1.weight": "body.3.body.2.block1.weight",
}


def renamed(name, config):
    """Return what TencentARC call a tensor, spelled out anew from their modules."""
    parts = name.split(".")[1:]
    if config.light:
        return ".".join(parts).replace("resnets", "body")
    if parts[0] != "body":
        return ".".join(parts)
    feature = int(parts[1])
    if parts[2] == "resnets":
        return ".".join(["body", str(2 * feature + int(parts[3])), *parts[4:]])
    layer = {"downsample": "down_opt.op"}.get(parts[2], parts[2])
    return f"body.{2 * feature}.{layer}.{parts[3]}"


def write(config, path, *, original, prefix="", drop="", more=()):
    tensors = {
        prefix + (renamed(name, config) if original else name): np.zeros(shape, np.float16)
        for name, shape in config.tensor_shapes().items()
    }
    tensors |= {name: np.zeros(2, np.float16) for name in more}
    save_file({name: array for name, array in tensors.items() if name != drop}, path)
    return path


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        FULL,
        LIGHT,
        replace(FULL, in_channels=1),
        replace(LIGHT, in_channels=1),
        replace(FULL, kernel=3),
        replace(FULL, strided=True),
    ],
)
def test_both_namings_are_read(config, original, tmp_path):
    if config.strided and not original:
        pytest.skip("diffusers' halve by averages alone")
    path = write(config, tmp_path / "adapter.safetensors", original=original)
    found, component = open_t2i_adapter(path, SMALL)
    assert found == config
    assert {name: component[name].shape for name in component} == config.tensor_shapes()
    expected = ORIGINAL_LIGHT if config.light else ORIGINAL
    for name, stored in expected.items():
        if original and name in config.tensor_shapes():
            assert component.sources[name].name == stored


def test_published_sizes_fit_their_families():
    sd1 = [(width, level) for _, width, level in adapted_places(PUBLISHED["sd1"].tensor_shapes())]
    xl = [(width, level) for _, width, level in adapted_places(PUBLISHED["xl"].tensor_shapes())]
    full = T2IAdapterConfig(channels=(320, 640, 1280, 1280))
    assert full.features() == sd1[:4] == [(320, 0), (640, 1), (1280, 2), (1280, 3)]
    larger = replace(full, downscale_factor=16)
    assert larger.features() == xl == [(320, 1), (640, 1), (1280, 2), (1280, 2)]
    assert larger.inputs == 768


def test_an_adapter_of_xl_is_told_by_its_first_layer(tmp_path):
    config = replace(FULL, downscale_factor=16)
    path = write(config, tmp_path / "xl.safetensors", original=True)
    with pytest.raises(ModelError, match=r"another family: .*\(8, 1\), \(16, 1\), \(32, 2\)"):
        open_t2i_adapter(path, SMALL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drop": "body.2.block1.weight"}, "lacks body.2.block1.weight"),
        ({"more": ["body.1.third.weight"]}, "holds body.1.third.weight, for which"),
        ({"more": ["body.8.block2.weight"]}, "of which no layer can be made|lacks body.8"),
    ],
)
def test_a_bad_file_is_one_sentence(change, said, tmp_path):
    path = write(FULL, tmp_path / "bad.safetensors", original=True, **change)
    with pytest.raises(ModelError, match=said):
        open_t2i_adapter(path, SMALL)


def test_squares_of_other_sides_and_even_kernels_are_refused(tmp_path):
    tensors = {renamed(n, FULL): np.zeros(s, "f2") for n, s in FULL.tensor_shapes().items()}
    path = tmp_path / "odd.safetensors"
    save_file(tensors | {"conv_in.weight": np.zeros((8, 48, 3, 3), "f2")}, path)
    with pytest.raises(ModelError, match="takes 48 channels; supported are 64, 256, 192, 768"):
        open_t2i_adapter(path, SMALL)
    save_file(tensors | {"body.0.block2.weight": np.zeros((8, 8, 2, 2), "f2")}, path)
    with pytest.raises(ModelError, match="kernel"):
        open_t2i_adapter(path, SMALL)


def test_others_are_none():
    assert not is_t2i_adapter({"input_hint_block.0.weight", "conv_in.weight"})
    assert not is_t2i_adapter({"body.0.rdb1.conv1.weight", "conv_first.weight"})
    with_prefix = {"adapter.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"}
    assert is_t2i_adapter(with_prefix)
