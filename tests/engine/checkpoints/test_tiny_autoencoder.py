"""Tiny autoencoders and decoders: the published architecture under every name, as diffusers'."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from engine.backends.settings import BackendSettings
from engine.checkpoints.single_file import open_vae
from engine.checkpoints.tiny_autoencoder import open_tiny_decoder
from engine.configs.diffusion import TinyAutoencoderConfig, TinyDecoderConfig
from engine.engines import open_engine
from engine.errors import ModelError
from engine.graphs.graph import find_graph
from engine.model import Model, find_model
from engine.shipped import GRAPHS
from runtime import Pipeline
from tests.support.tolerances import TINY_PIXELS

DECODER = "decoder.layers."


@pytest.fixture(scope="module")
def published():
    """Give diffusers' TAESD with random weights that keep activations the size they come in."""
    torch.manual_seed(0)
    module = AutoencoderTiny().eval()
    for parameter in module.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
            parameter.data *= 0.7
        else:
            torch.nn.init.constant_(parameter, 0.05)
    return module


def original(module):
    """Name the decoder's tensors as TAESD's own files do."""
    named = {}
    for name, value in module.state_dict().items():
        if name.startswith(DECODER):
            number, rest = name.removeprefix(DECODER).split(".", 1)
            named[f"{int(number) + 1}.{rest}"] = value.contiguous()
    return named


def saved(kind, module, folder):
    if kind == "folder":
        module.save_pretrained(folder / "taesd")
        return folder / "taesd"
    path = folder / f"taesd_decoder.{'pth' if kind == 'pickle' else 'safetensors'}"
    if kind == "pickle":
        torch.save(original(module), path)
    elif kind == "diffusers":
        save_file(module.state_dict(), path)
    else:
        save_file(original(module), path)
    return path


@pytest.mark.parametrize("kind", ["folder", "diffusers", "original", "pickle"])
def test_pixels_are_those_of_diffusers(kind, published, tmp_path):
    config, component = open_tiny_decoder(saved(kind, published, tmp_path))
    assert config == TinyDecoderConfig()
    graph = find_graph("preview_decoder", config, "float32", [GRAPHS], tmp_path)
    engine = open_engine(graph, component, BackendSettings(threads=1))
    latents = 2 * torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = published.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    expected = 127.5 * (expected + 1)
    assert expected.std() > 20, "a constant picture would show nothing"
    pixels = engine.run({"latents": latents.numpy()})["pixels"]
    assert pixels.shape == (2, 40, 64, 3)
    assert np.abs(pixels - expected).max() <= TINY_PIXELS


@pytest.mark.parametrize("blocks", [(3, 3, 3, 1), (1, 2, 1, 3)])
def test_every_tensor_has_the_shape_of_diffusers(blocks):
    module = AutoencoderTiny(
        decoder_block_out_channels=(6,) * 4,
        num_decoder_blocks=blocks,
        encoder_block_out_channels=(6,) * 4,
        latent_channels=5,
    )
    config = TinyDecoderConfig.from_dict({**module.config, "_class_name": "AutoencoderTiny"})
    state = {k: tuple(v.shape) for k, v in module.state_dict().items() if k.startswith("decoder.")}
    assert config.tensor_shapes() == state


def test_a_small_one_of_other_widths_is_read_off_its_file(tmp_path):
    module = AutoencoderTiny(
        decoder_block_out_channels=(6,) * 4, num_decoder_blocks=(2, 1, 3, 1), latent_channels=7
    )
    config, component = open_tiny_decoder(saved("original", module, tmp_path))
    assert (config.latent_channels, config.num_decoder_blocks) == (7, (2, 1, 3, 1))
    assert config.decoder_block_out_channels == (6,) * 4
    assert np.array_equal(
        component["decoder.layers.0.weight"], module.decoder.layers[0].weight.detach()
    )


def changed(module, change):
    tensors = original(module)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("8.conv.2.bias"), "lacks 8.conv.2.bias"),
        (lambda t: t.update({"8.conv.2.bias": torch.zeros(3)}), "8.conv.2.bias has shape"),
        (lambda t: t.update({"21.weight": torch.zeros(3)}), "no tiny decoder such as TAESD"),
        (lambda t: t.update({"3.pool.0.weight": torch.zeros(3)}), "holds 3.pool.0.weight"),
        (lambda t: t.update({"8.weight": torch.zeros(3)}), "no tiny decoder"),
        (lambda t: t.pop("1.weight"), "no tiny decoder"),
        (lambda t: t.clear() or t.update(a=torch.zeros(1)), "no tiny decoder such as TAESD"),
    ],
)
def test_another_file_is_refused_in_one_sentence(change, said, published, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(changed(published, change), path)
    with pytest.raises(ModelError, match=said) as caught:
        open_tiny_decoder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_encoder_is_no_decoder(published, tmp_path):
    path = tmp_path / "taesd_encoder.safetensors"
    layers = "encoder.layers."
    save_file(
        {k.removeprefix(layers): v for k, v in published.state_dict().items() if layers in k}, path
    )
    with pytest.raises(ModelError, match="give a taesd_decoder or taesdxl_decoder file"):
        open_tiny_decoder(path)


class Bomb:
    def __reduce__(self):
        return print, ("it ran",)


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    path = tmp_path / "taesd_decoder.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError):
        open_tiny_decoder(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "of the class 'AutoencoderKL'; an AutoencoderTiny's"),
        ({"act_fn": "silu"}, "act_fn = 'silu'"),
        ({"scaling_factor": 0.18215}, "scaling_factor = 0.18215"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor = 4"),
        ({"num_decoder_blocks": [3, 3, 3]}, "4 levels of one width"),
        ({"decoder_block_out_channels": [64, 64, 64, 32]}, "4 levels of one width"),
        ({"latent_channels": "4"}, "latent_channels is '4'"),
    ],
)
def test_another_configuration_is_refused(change, said, published, tmp_path):
    folder = saved("folder", published, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ModelError, match=said):
        open_tiny_decoder(folder)


def test_one_for_other_latents_does_not_fit_the_model(tmp_path):
    module = AutoencoderTiny(latent_channels=16)
    path = saved("original", module, tmp_path)
    with pytest.raises(ModelError, match=r"latents of 16 channels to 8 pixels .* have 8 and 8"):
        Pipeline.load("pictogram", preview_decoder=path)


def test_the_weights_stay_below_24_megabytes():
    files = find_model("pictogram").rglob("*.safetensors")
    assert 20e6 < sum(path.stat().st_size for path in files) <= 24e6


# In the place of a model's own autoencoder


def halves(module):
    """Name both halves as TAESD's own files do."""
    encoder = {
        name.removeprefix("encoder.layers."): value.contiguous()
        for name, value in module.state_dict().items()
        if name.startswith("encoder.")
    }
    return {"encoder": encoder, "decoder": original(module)}


def write_vae(kind, module, folder):
    """Write an autoencoder as people have it; returns what is given with --vae."""
    if kind == "folder":
        module.save_pretrained(folder / "taesd")
        return folder / "taesd"
    path, parts = folder / "taesd.safetensors", halves(module)
    if kind == "two files":
        for half, tensors in parts.items():
            torch.save(tensors, folder / f"taesd_{half}.pth")
        return folder / "taesd_decoder.pth"
    if kind == "diffusers":
        tensors = module.state_dict()
    elif kind == "comfyui":
        tensors = {f"taesd_{half}.{n}": v for half, part in parts.items() for n, v in part.items()}
        tensors |= {"vae_scale": torch.ones(()), "vae_shift": torch.zeros(())}
    elif kind == "taesd":
        tensors = {f"{half}.{n}": v for half, part in parts.items() for n, v in part.items()}
    else:  # of a whole model that stable-diffusion.cpp wrote
        tensors = {f"tae.{name}": value for name, value in module.state_dict().items()}
    save_file(tensors, path)
    return path


KINDS = ["folder", "diffusers", "two files", "comfyui", "taesd", "whole model"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_one_is_found_under_every_name(kind, published, tmp_path):
    config, component = open_vae(write_vae(kind, published, tmp_path))
    assert config == TinyAutoencoderConfig()
    assert not config.draws_posterior
    expected = published.state_dict()
    assert component.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(component[name], value.numpy())


def test_pictures_are_decoded_and_encoded_as_diffusers_does(published, tmp_path):
    config, component = open_vae(write_vae("diffusers", published, tmp_path))
    engines = {
        part: open_engine(
            find_graph(part, config, "float32", [GRAPHS], tmp_path),
            component,
            BackendSettings(threads=1),
        )
        for part in ("vae_decoder", "vae_encoder")
    }
    latents = 2 * torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(2))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    with torch.no_grad():
        decoded = published.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
        sample = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        encoded = published.encode(sample).latents.numpy()
    ours = engines["vae_decoder"].run({"latents": latents.numpy()})["pixels"]
    assert np.abs(ours - 127.5 * (decoded + 1)).max() <= TINY_PIXELS
    noise = np.ones((1, 4, 6, 8), np.float32)  # which is not used
    ours = engines["vae_encoder"].run({"pixels": pixels, "noise": noise})["latents"]
    np.testing.assert_allclose(ours, encoded, atol=1e-4 * np.abs(encoded).max())


def test_a_decoder_alone_decodes_and_says_what_encodes(published, tmp_path):
    path = tmp_path / "taesd_decoder.safetensors"
    save_file(original(published), path)
    model = Model.open(find_model("pictogram"))
    config, component = open_vae(path)
    assert set(component) == {n for n in published.state_dict() if n.startswith("decoder.")}
    configs = {**model.configs, "vae": config}
    alone = replace(model, configs=configs, find=lambda name: component)
    assert alone.weights("vae_decoder") is component
    with pytest.raises(ModelError, match="has the decoder of a tiny autoencoder alone"):
        alone.weights("vae_encoder")


def test_every_shape_is_that_of_diffusers():
    module = AutoencoderTiny(
        encoder_block_out_channels=(6,) * 4,
        num_encoder_blocks=(2, 1, 3, 1),
        decoder_block_out_channels=(10,) * 4,
        num_decoder_blocks=(1, 2, 1, 3),
        latent_channels=5,
    )
    values = {**module.config, "_class_name": "AutoencoderTiny"}
    shapes = TinyAutoencoderConfig.from_dict(values).tensor_shapes()
    assert shapes == {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_an_architecture_is_read_off_both_halves(tmp_path):
    module = AutoencoderTiny(
        encoder_block_out_channels=(6,) * 4,
        num_encoder_blocks=(2, 1, 3, 1),
        decoder_block_out_channels=(10,) * 4,
        num_decoder_blocks=(1, 2, 1, 3),
        latent_channels=5,
    )
    config, _ = open_vae(write_vae("taesd", module, tmp_path))
    assert config.num_encoder_blocks == (2, 1, 3, 1)
    assert config.num_decoder_blocks == (1, 2, 1, 3)
    assert config.encoder_block_out_channels == (6,) * 4
    assert config.latent_channels == 5
