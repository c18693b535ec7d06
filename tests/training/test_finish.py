"""The decoder's finish: who learns from which loss, how they are weighed, what stays."""

import dataclasses

import numpy as np
import pytest
import torch

from export.modules.autoencoder import Autoencoder
from training import autoencoder, finish
from training.adversarial import hinge
from training.autoencoder import encode
from training.finish import Discriminator, Opponents
from training.loop import LoopSettings

TINY = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
SETTINGS = LoopSettings(
    steps=3, batch_size=2, learning_rate=1e-3, warmup_steps=1, ema_decay=0.5, sample_steps=3
)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Autoencoder(TINY)


def network(images):
    return [images, images.square()]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_encoder_stays_and_the_decoder_learns(module, images, tmp_path):
    latents, before = encode(module, images), state(module)
    finished = finish.train(module, images, network, SETTINGS, tmp_path, draws=np.ones(6))
    torch.testing.assert_close(encode(finished, images), latents, rtol=0, atol=0)
    changed = {
        name.partition(".")[0]
        for name, value in state(finished).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finish-000003.png", "finish.pt"]


@pytest.mark.parametrize(("start", "opposed"), [(0.0, 3), (0.5, 1), (2.0, 0)])
def test_the_discriminator_learns_alone_until_its_start(
    module, images, tmp_path, monkeypatch, start, opposed
):
    monkeypatch.setattr(finish, "ADVERSARIAL_START", start)
    weighed, weigh = [], finish._weight
    monkeypatch.setattr(finish, "_weight", lambda *given: weighed.append(1) or weigh(*given))
    finish.train(module, images, network, SETTINGS, tmp_path)
    optimizers = torch.load(tmp_path / "finish.pt", weights_only=True)["optimizers"]
    decoders = sum(p.requires_grad for p in module.parameters())
    assert len(optimizers[0]["state"]) == decoders + 8
    assert len(weighed) == opposed


def test_each_loss_reaches_its_own_parameters(module):
    opponents = Opponents(module)
    drawn = torch.rand(2, 3, 32, 32, requires_grad=True)
    (-opponents.real_patches(drawn).mean()).backward()
    assert drawn.grad is not None
    assert drawn.grad.abs().sum() > 0
    assert all(p.grad is None for p in opponents.discriminator.parameters())
    opponents.eval()  # in which the estimate of the norms stays
    torch.testing.assert_close(opponents.real_patches(drawn), opponents.discriminator(drawn))


def test_the_hinge_loss():
    real, drawn = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge(real, drawn)) == pytest.approx(0.5 * (0.25 + 0.75))
    assert hinge(torch.tensor([1.5]), torch.tensor([-1.5])) == 0


def test_the_discriminator_is_weighed_by_the_gradients_of_the_last_layer():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, adversarial = (3 * last).sum(), (last * torch.tensor([0.0, -1.5])).sum()
    expected = finish.ADVERSARIAL_WEIGHT * (3 * 2**0.5) / (1.5 + 1e-4)
    assert float(finish._weight(loss, adversarial, last)) == pytest.approx(expected)
    tiny = finish._weight(loss, adversarial * 1e-12, last)
    assert float(tiny) == finish.ADVERSARIAL_WEIGHT * finish.MAX_WEIGHT
    assert not tiny.requires_grad


def test_no_layer_of_the_discriminator_but_the_last_stretches():
    torch.manual_seed(0)
    discriminator = Discriminator()
    for _ in range(50):  # each call follows the largest direction a little further
        discriminator(torch.rand(1, 3, 32, 32))
    convolutions = [layer for layer in discriminator.layers if hasattr(layer, "weight")]
    assert len(convolutions) == 4
    for layer in convolutions[:-1]:
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        assert float(values[0]) == pytest.approx(1.0, abs=0.02)
    assert discriminator(torch.rand(1, 3, 64, 64)).shape == (1, 1, 7, 7)


def test_decoders_are_compared_before_and_after(module, images):
    worse = Autoencoder(TINY)
    worse.load_state_dict(module.state_dict())
    with torch.no_grad():
        worse.decoder.conv_out.bias += 0.5
    found = finish.compare(module, worse, images, network)
    drawn = autoencoder.reconstruct(worse, images)
    assert found.psnr[1] == autoencoder.psnr(images, drawn)
    same = finish.compare(module, module, images, network)
    assert same.psnr[0] == same.psnr[1] == found.psnr[0]
    assert same.distance[0] == same.distance[1] == found.distance[0] != found.distance[1]
    assert found.asdict() == {"psnr": list(found.psnr), "distance": list(found.distance)}
