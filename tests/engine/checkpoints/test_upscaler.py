"""Upscalers' files, in all their names, against the published architectures in torch."""

import pytest
import torch
from safetensors.torch import save_file

from engine.backends.settings import BackendSettings
from engine.checkpoints.upscaler import open_upscaler
from engine.engines import open_engine
from engine.errors import ModelError
from engine.graphs.upscalers import upscaler_graph
from tests.support.tolerances import UPSCALER_RTOL
from tests.support.upscalers import (
    OldRRDBNet,
    RRDBNet,
    SRVGGNetCompact,
    SwinIR,
    seeded,
    trunk_names,
)

SETTINGS = BackendSettings(backend="cpu", threads=1)
NETWORKS = {
    "x4plus": (RRDBNet, {}),
    "anime 6B": (RRDBNet, {"blocks": 3, "width": 12}),
    "x2plus": (RRDBNet, {"unshuffle": 2}),
    "x1": (RRDBNet, {"unshuffle": 4}),
    "x2": (RRDBNet, {"doublings": 1}),
    "x8": (RRDBNet, {"doublings": 3}),
    "restoring": (RRDBNet, {"doublings": 0}),
    "plus": (RRDBNet, {"plus": True}),
    "general x4v3": (SRVGGNetCompact, {"convs": 5}),
    "animevideo": (SRVGGNetCompact, {"upscale": 2}),
    "compact x1": (SRVGGNetCompact, {"upscale": 1}),
    "SwinIR classical": (SwinIR, {}),
    "SwinIR x3": (SwinIR, {"upscale": 3}),
    "SwinIR x2": (SwinIR, {"upscale": 2}),
    "SwinIR light": (SwinIR, {"upsampler": "pixelshuffledirect", "upscale": 2}),
    "SwinIR real": (SwinIR, {"upsampler": "nearest+conv"}),
    "SwinIR real x2": (SwinIR, {"upsampler": "nearest+conv", "upscale": 2}),
    "SwinIR large": (SwinIR, {"upsampler": "nearest+conv", "three": True}),
    "SwinIR denoising": (SwinIR, {"upsampler": "", "upscale": 1}),
    "SwinIR for JPEG": (SwinIR, {"upsampler": "", "upscale": 1, "window": 7}),
    "SwinIR odd window": (SwinIR, {"window": 7, "upscale": 2}),
}


def pixels(height, width):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def error(file, network, height, width):
    """Return the largest difference, over the largest number of the reference."""
    graph = upscaler_graph(file.config, "float32")
    engine = open_engine(graph, file.weights, SETTINGS)
    given = pixels(height, width)
    with torch.no_grad():
        expected = network(given)
    found = torch.from_numpy(engine.run({"pixels": given.numpy()})["upscaled"])
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_gives_what_torch_gives(name, tmp_path):
    kind, options = NETWORKS[name]
    network = seeded(kind, **options)
    torch.save({"params_ema": network.state_dict()}, tmp_path / "a.pth")
    file = open_upscaler(tmp_path / "a.pth")
    side = file.config.multiple
    assert error(file, network, 8 * side, 3 * side) < UPSCALER_RTOL
    assert file.config.scale == network(pixels(4 * side, 4 * side)).shape[2] // (4 * side)


NAMED = {
    "BasicSR": lambda network: network.state_dict(),
    "trunk": lambda network: trunk_names(network.state_dict()),
    "numbered": lambda network: OldRRDBNet(network).state(),
}


@pytest.mark.parametrize("names", NAMED)
@pytest.mark.parametrize("options", [{}, {"doublings": 1}, {"doublings": 0}, {"plus": True}])
def test_names_of_all_programs(names, options, tmp_path):
    network = seeded(RRDBNet, **options)
    state = {name: tensor.clone() for name, tensor in NAMED[names](network).items()}
    save_file(state, tmp_path / "a.safetensors")
    assert error(open_upscaler(tmp_path / "a.safetensors"), network, 9, 5) < UPSCALER_RTOL


def saved(path, **changes):
    """Write a small ESRGAN whose tensors are changed, or left out where that is None."""
    state = {**seeded(RRDBNet, blocks=1).state_dict(), **changes}
    torch.save({name: t for name, t in state.items() if t is not None}, path)
    return path


def refusal(path):
    with pytest.raises(ModelError) as caught:
        open_upscaler(path)
    assert str(path) in str(caught.value)
    return str(caught.value).removeprefix(str(path))


CONV = torch.zeros(3, 16, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_hr.bias": None}, " lacks conv_hr.bias of"),
        ({"conv_last.weight": None}, "has no conv_last.weight"),
        ({"body.0.rdb2.conv3.weight": None}, " lacks body.0.rdb2.conv3.weight of"),
        ({"further.weight": CONV}, " holds further.weight, for which"),
        ({"conv_up3.weight": torch.zeros(16, 16, 3, 3)}, " lacks conv_up3.bias of"),
        ({"conv_first.weight": torch.zeros(16, 1, 3, 3)}, "takes 1 channels, where pictures"),
        ({"conv_first.weight": torch.zeros(16, 4, 3, 3)}, "takes 4 channels, where pictures"),
        ({"conv_last.weight": torch.zeros(1, 16, 3, 3)}, "gives 1 channels, where pictures"),
        ({"conv_first.weight": torch.zeros(16, 27, 3, 3)}, "takes pictures apart by 3"),
        ({"conv_first.weight": torch.zeros(16)}, "conv_first.weight has the shape"),
        ({"conv_hr.weight": CONV}, "conv_hr.weight has shape"),
        ({"conv_hr.bias": torch.zeros(16, dtype=torch.int64)}, "is no weight's"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    assert message in refusal(saved(tmp_path / "a.pth", **changes)).replace("which is no", "is no")


def test_one_model_of_a_training_checkpoint_is_used(tmp_path):
    """The averages, if they are there; the same model beside them is no tensor left over."""
    averaged, last = seeded(RRDBNet, blocks=1), seeded(RRDBNet, blocks=1)
    with torch.no_grad():
        last.conv_last.bias += 1
    both = {"params": last.state_dict(), "params_ema": averaged.state_dict()}
    torch.save(both, tmp_path / "a.pth")
    file = open_upscaler(tmp_path / "a.pth")
    assert error(file, averaged, 5, 5) < UPSCALER_RTOL
    assert file.notes == ("the weights under params_ema are used, not those beside them",)
    torch.save({**both, "other": {"conv_first.weight": CONV, "x": CONV}}, tmp_path / "b.pth")
    assert " holds other.x" in refusal(tmp_path / "b.pth")


def test_buffers_that_follow_from_the_window_are_known(tmp_path):
    state = seeded(SwinIR).state_dict()
    assert any(name.endswith("relative_position_index") for name in state)
    state["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({"params": state}, tmp_path / "a.pth")
    assert open_upscaler(tmp_path / "a.pth").kind == "SwinIR"


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"model.0.weight": CONV},
        {"model.diffusion_model.input_blocks.0.0.weight": CONV},
        {"body.0.conv.weight": CONV, "tail.0.weight": CONV},
        {"x" * 500: CONV},
    ],
)
def test_what_is_no_upscaler(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    said = refusal(tmp_path / "a.pth")
    assert "no upscaler that is known here" in said or "no tensors" in said
    assert len(said) < 500


@pytest.mark.parametrize(
    "state",
    [
        {"body.1.weight": torch.zeros(3)},
        {"body.0.weight": CONV, "body.1.weight": CONV},
        {"model.1.sub.0.RDB1.conv1.0.weight": CONV},
        {"RRDB_trunk.0.RDB1.conv1.weight": CONV},
        {"body.0.rdb1.conv1.weight": torch.zeros(0, 3, 3, 3)},
        {"layers.0.residual_group.blocks.0.norm1.weight": torch.zeros(3)},
    ],
)
def test_what_only_seems_to_be_one(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    assert "seems to be an upscaler" in refusal(tmp_path / "a.pth")


def test_windows_and_scales_are_bounded(tmp_path):
    state = seeded(SwinIR).state_dict()
    table = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    for rows, said in ((63**2, "distances"), (48, "distances"), (4, "distances")):
        torch.save({**state, table: torch.zeros(rows, 2)}, tmp_path / "a.pth")
        assert said in refusal(tmp_path / "a.pth")
    torch.save(seeded(SRVGGNetCompact, upscale=17).state_dict(), tmp_path / "b.pth")
    assert "enlarges 17 times; up to 16 are taken" in refusal(tmp_path / "b.pth")


def test_a_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    state = {**seeded(RRDBNet, blocks=1).state_dict(), "conv_last.bias": Hostile()}
    torch.save(state, tmp_path / "a.pth")
    assert "it could run code" in refusal(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precisions_and_of_old_torch(dtype, tmp_path):
    """ESRGAN's own files are of torch before 1.6, and many others of float16."""
    network = seeded(RRDBNet, blocks=1).to(dtype)
    state = OldRRDBNet(network).state()
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    file = open_upscaler(tmp_path / "a.pth")
    assert error(file, network.float(), 6, 5) < UPSCALER_RTOL


@pytest.mark.parametrize("wrapper", ["state_dict", "params", "params_ema", "generator", "a.b"])
def test_wherever_a_training_puts_the_model(wrapper, tmp_path):
    state = {f"{wrapper}.module.{name}": t for name, t in seeded(SwinIR).state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    assert error(open_upscaler(tmp_path / "a.pth"), seeded(SwinIR), 8, 4) < UPSCALER_RTOL
