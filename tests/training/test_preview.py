import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from engine.configs.diffusion import TinyDecoderConfig
from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from export.modules.tiny_autoencoder import TinyAutoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder, preview, ship
from training.diffusion import Denoiser
from training.loop import LoopSettings

SMALL = TinyDecoderConfig(
    latent_channels=8, decoder_block_out_channels=(4,) * 4, num_decoder_blocks=(1,) * 4
)


class Data:
    """Six flat pictures."""

    images = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (6, 1, 1, 3), np.uint8), (6, 64, 64, 3)
    )

    def caption(self, index, rng):
        return f"square {index}"


@pytest.fixture(scope="module")
def model():
    folder = find_model("pictogram")
    denoiser_state, autoencoder_state = ship.read_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    denoiser, trained = Denoiser(tokenizer.vocab_size), Autoencoder(autoencoder.CONFIG)
    denoiser.load_state_dict(denoiser_state)
    trained.load_state_dict(autoencoder_state)
    return denoiser.eval(), trained.eval(), tokenizer


@pytest.fixture(scope="module")
def decoded(model):
    return preview.examples(Data(), *model, seed=0)


def test_examples_are_latents_with_what_they_decode_to(decoded, model):
    _, trained, _ = model
    assert decoded.latents.shape == (6, 8, 8, 8)
    assert (decoded.images.shape, decoded.images.dtype) == ((6, 3, 64, 64), torch.uint8)
    latents = autoencoder.encode(trained, np.ascontiguousarray(Data.images))
    error = (decoded.latents - latents).square().mean((1, 2, 3))
    assert error[1::2].max() < 1e-3 < error[::2].min(), "every other one is the denoiser's"
    with torch.no_grad():
        expected = trained.decode(decoded.latents).clamp(-1, 1).add(1).mul(127.5)
    assert (decoded.images - expected).abs().mean() < 1, "of 255: bfloat16"


def test_examples_are_those_of_the_seed(decoded, model):
    assert torch.equal(preview.examples(Data(), *model, seed=0).latents, decoded.latents)
    assert not torch.equal(preview.examples(Data(), *model, seed=1).latents, decoded.latents)


def test_the_difference_looks_at_what_is_seen():
    wanted = torch.tensor([0.0, 1.0, 0.5])
    assert preview.difference(wanted, wanted) == 0
    beyond = preview.difference(torch.tensor([-0.3, 1.3, 0.5]), wanted)
    assert 0 < beyond < 1e-3
    wrong = torch.tensor([2.0], requires_grad=True)
    preview.difference(wrong, torch.tensor([0.0])).backward()
    assert wrong.grad > 0, "a pixel on the wrong side comes back"


def test_training_learns_and_writes_what_diffusers_takes(decoded, tmp_path):
    settings = LoopSettings(
        steps=240, batch_size=4, learning_rate=1e-2, warmup_steps=5, sample_steps=200, muon=True
    )
    torch.manual_seed(settings.seed)
    before = preview.draw(TinyAutoencoder(SMALL), decoded.latents)
    trained = preview.train(decoded, settings, tmp_path / "work", SMALL)
    after = preview.draw(trained, decoded.latents)
    errors = [(drawn.float() - decoded.images).square().mean() for drawn in (before, after)]
    assert errors[1] < errors[0] / 3
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert names == ["preview-000200.png", "preview.pt"]

    folder = preview.write(trained, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    assert TinyDecoderConfig.from_dict(values) == SMALL
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    module = AutoencoderTiny.from_config(values)
    names = [n for n in module.state_dict() if n.startswith("decoder.")]
    assert names == list(trained.state_dict())
