"""Diffusion upsamplers' files: their UNet against diffusers' UNet2DModel, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.backends.settings import BackendSettings
from engine.checkpoints.upscaler import is_upscaler, open_upscaler
from engine.configs.upsampler import UpsamplerConfig
from engine.engines import open_engine
from engine.errors import ModelError
from engine.graphs.upsampler import upsampler_graph
from latentrt.info import find_facts
from tests.support.tolerances import UPSAMPLER_RTOL
from tests.support.unet2d import unet2d
from tests.support.upscaler_files import UPSAMPLER, write_upsampler

CONFIGS = {
    "small": UPSAMPLER,
    "four times": UpsamplerConfig(block_out_channels=(8, 16), upscale=4),
    "three times": UpsamplerConfig(block_out_channels=(16, 8), upscale=3),
    "deep": UpsamplerConfig(block_out_channels=(8, 16, 24), layers_per_block=2),
    "one level": UpsamplerConfig(block_out_channels=(16,)),
    "as trained": UpsamplerConfig(),
}


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_gives_what_diffusers_gives(name, backend, tmp_path):
    config = CONFIGS[name]
    path = write_upsampler(tmp_path / "a.safetensors", config, scale=0.1)
    file = open_upscaler(path)
    assert file.config == config
    settings = BackendSettings(backend=backend, threads=1)
    engine = open_engine(upsampler_graph(config, "float32"), file.weights, settings, "float32")
    height, width = 3 * config.multiple, 5 * config.multiple
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 2 * config.out_channels, height, width), np.float32)
    for timestep, level in ((999, 0), (0, 99), (500, 37)):
        with torch.no_grad():
            expected = unet2d(path, config)(
                torch.from_numpy(sample), timestep, class_labels=torch.tensor([level])
            ).sample.numpy()
        times = np.array([timestep, level], np.float32)
        found = engine.run({"sample": sample, "times": times})["out"]
        assert abs(found - expected).max() < UPSAMPLER_RTOL * abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_products_are_those_of_its_convolutions(name, tmp_path):
    """Counted where diffusers' module makes them."""
    config, counted = CONFIGS[name], []
    unet = unet2d(write_upsampler(tmp_path / "a.safetensors", config), config)

    def count(layer, given, found):
        counted.append(layer.weight.numel() * found.shape[2] * found.shape[3])

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    side = 4 * config.multiple
    with torch.no_grad():
        unet(torch.zeros(1, 2 * config.out_channels, side, side), 0, torch.zeros(1))
    assert config.products() == pytest.approx(sum(counted) / side**2, abs=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv_in.weight": np.zeros((8, 25, 3, 3))}, "25 channels, no pixels of two pictures"),
        ({"conv_in.weight": np.zeros((8, 3, 3, 3))}, "3 channels, no pixels of two pictures"),
        ({"conv_in.weight": np.zeros(8)}, "conv_in.weight has the shape"),
        ({"conv_in.weight": np.zeros((8, 54, 3, 3))}, "conv_out.weight has shape"),
        ({"conv_in.weight": np.zeros((8, 6 * 17**2, 3, 3))}, "enlarges 17 times"),
        ({"conv_out.bias": None}, "lacks upsampler.conv_out.bias"),
        ({"class_embedding.linear_1.weight": None}, "lacks upsampler.class_embedding.linear_1"),
        ({"mid_block.attentions.0.to_q.weight": np.zeros((16, 16))}, "holds upsampler.mid_block.a"),
        ({"down_blocks.0.resnets.0.conv1.weight": None}, "widths (), not multiples of 8"),
        ({"down_blocks.1.resnets.0.conv1.weight": np.zeros((12, 8, 3, 3))}, "widths (8, 12), not"),
        ({"down_blocks.0.resnets.1.conv1.weight": np.zeros((8, 8, 3, 3))}, "lacks upsampler.down"),
    ],
)
def test_what_does_not_fit_is_named(changes, said, tmp_path):
    path = write_upsampler(tmp_path / "a.safetensors")
    state = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del state[f"upsampler.{name}"]
        else:
            state[f"upsampler.{name}"] = tensor.astype(np.float32)
    save_file(state, path)
    with pytest.raises(ModelError) as caught:
        open_upscaler(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_info_tells_what_it_is(tmp_path):
    facts = find_facts(write_upsampler(tmp_path / "a.safetensors"))
    assert (facts["kind"], facts["network"], facts["scale"]) == ("upscaler", "diffusion", 2)
    assert facts["architecture"]["block_out_channels"] == [8, 16]
    assert not is_upscaler(["conv_in.weight", "unet.conv_in.weight"]), "another UNet is none"
