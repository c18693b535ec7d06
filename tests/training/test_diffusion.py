import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support import tolerances
from training import autoencoder, diffusion
from training.diffusion import (
    PREVIEW_STEPS,
    SCHEDULER,
    TERMINAL_SNR,
    UNCONDITIONAL,
    Denoiser,
    Examples,
    denoise,
    draw_timesteps,
    initialise,
)
from training.loop import LoopSettings
from training.text_encoders import MAX_TOKENS
from training.vocabulary import cut_vocabulary, write_tokenizer

TINY = dataclasses.replace(
    diffusion.UNET,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=96,
)
TINY_AUTOENCODER = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
TEXTS = ("red", "green", "blue")
CHANNELS = TINY.in_channels


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary, merges = cut_vocabulary(["red"], 520, [("e", "d</w>"), ("r", "ed</w>")])
    write_tokenizer(folder, vocabulary, merges, MAX_TOKENS)
    return Tokenizer.load(folder)


@pytest.fixture
def examples():
    latents = torch.randn(3, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    return Examples(latents=latents, captions=lambda index, rng: [TEXTS[index]])


def train(examples, tokenizer, folder, *, steps, batch_size=4, sample_steps=1000, seed=0):
    settings = LoopSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        sample_steps=sample_steps,
        seed=seed,
    )
    trained = Autoencoder(TINY_AUTOENCODER).eval()
    return diffusion.train(
        examples, tokenizer, trained, settings, folder, prompts=["red", "blue"], unet=TINY
    )


def record_calls(monkeypatch, forward=None):
    """Record what the denoiser is given, as (latents, timesteps, input_ids)."""
    calls, original = [], Denoiser.forward

    def recorded(self, latents, timesteps, input_ids):
        calls.append((latents.clone(), timesteps, input_ids))
        return (forward or original)(self, latents, timesteps, input_ids)

    monkeypatch.setattr(Denoiser, "forward", recorded)
    return calls


def record_losses(monkeypatch):
    losses, update = [], diffusion.Loop._update

    def recorded(self, loss):
        losses.append(loss.item())
        update(self, loss)

    monkeypatch.setattr(diffusion.Loop, "_update", recorded)
    return losses


def test_timesteps_cover_the_range_and_favour_noise():
    torch.manual_seed(0)
    timesteps = draw_timesteps(40_000, 1000)
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min() < 10
    assert 990 < timesteps.max() <= 999
    tenths = torch.histc(timesteps.float(), 10, 0, 1000) / 40_000
    # 0.3 uniform, 0.7 of density 2 t: the i-th tenth has 0.03 + 0.7 (2 i + 1) / 100
    expected = [0.03 + 0.007 * (2 * i + 1) for i in range(10)]
    assert tenths.tolist() == pytest.approx(expected, abs=0.01)


def test_a_denoiser_that_returns_v_has_no_loss(examples, tokenizer, tmp_path, monkeypatch):
    """With one picture x0, diffusers gives v of the x that came: the loss must vanish."""
    x0 = examples.latents[:1]
    reference = DDIMScheduler.from_config(SCHEDULER)

    def exact(self, x, timesteps, input_ids):
        alpha = reference.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        noise = (x - alpha * x0) / (1 - alpha**2).sqrt()
        start = x0.expand_as(x)
        return reference.get_velocity(start, noise, timesteps) + 0 * self.unet.conv_out.bias.sum()

    record_calls(monkeypatch, exact)
    losses = record_losses(monkeypatch)
    one = dataclasses.replace(examples, latents=x0)
    train(one, tokenizer, tmp_path, steps=3)
    assert max(losses) < 1e-6


def test_the_untrained_loss_is_that_of_no_answer(examples, tokenizer, tmp_path, monkeypatch):
    losses = record_losses(monkeypatch)
    train(examples, tokenizer, tmp_path, steps=1, batch_size=256)
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # v of unit noise and unit latents


def test_a_tenth_of_the_captions_is_dropped(examples, tokenizer, tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    train(examples, tokenizer, tmp_path, steps=1, batch_size=500)
    empty = torch.from_numpy(tokenizer([""]).input_ids)
    dropped = (calls[0][2] == empty).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(UNCONDITIONAL, abs=0.04)
    assert calls[0][2].shape == (500, MAX_TOKENS)


def test_a_resumed_training_draws_other_noise(examples, tokenizer, tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    for folder, steps in (("a", 1), ("b", 1), ("a", 2)):
        train(examples, tokenizer, tmp_path / folder, steps=steps, batch_size=64)
    first, again, resumed = calls
    for a, b, c in zip(first, again, resumed, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_training_writes_checkpoint_and_samples(examples, tokenizer, tmp_path):
    denoiser = train(examples, tokenizer, tmp_path, steps=2, sample_steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "diffusion-000002.png",
        "diffusion.pt",
    ]
    state = torch.load(tmp_path / "diffusion.pt", weights_only=True)
    assert state["step"] == 2
    torch.testing.assert_close(dict(denoiser.state_dict()), dict(state["ema"]))


def test_an_initialised_denoiser_answers_nothing(tokenizer):
    denoiser = Denoiser(tokenizer.vocab_size, TINY)
    initialise(denoiser)
    input_ids = torch.from_numpy(tokenizer(["red"]).input_ids)
    with torch.no_grad():
        assert not denoiser(torch.ones(1, CHANNELS, 4, 4), torch.tensor([5]), input_ids).any()


def test_previews_are_rows_of_pictures(tokenizer):
    torch.manual_seed(0)
    denoiser = Denoiser(tokenizer.vocab_size, TINY).eval()
    input_ids = torch.from_numpy(tokenizer(["", "red", "blue"]).input_ids)
    rows = denoise(denoiser, Autoencoder(TINY_AUTOENCODER).eval(), input_ids, size=(CHANNELS, 4, 4))
    assert len(rows) == len(PREVIEW_STEPS)
    for row in rows:
        assert row.shape == (2, 32, 32, 3)
        assert row.dtype == np.uint8


def test_previews_end_where_the_model_points(tokenizer):
    """A model that knows x0 and answers v of it draws x0, in the latents of an identity."""
    x0 = torch.randn(CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1)) / 4
    alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod).float()

    class Exact(nn.Module):
        def forward(self, x, timesteps, context):
            alpha = alphas[timesteps.long()].sqrt()[:, None, None, None]
            sigma = (1 - alpha**2).sqrt()
            return alpha * (x - alpha * x0) / sigma - sigma * x0

    class Identity(nn.Module):
        config = TINY_AUTOENCODER

        def decode(self, latents):
            return latents[:, :3]

    denoiser = Denoiser(tokenizer.vocab_size, TINY)
    denoiser.unet = Exact()
    input_ids = torch.from_numpy(tokenizer(["", "red"]).input_ids)
    drawn = denoise(denoiser, Identity(), input_ids, size=(CHANNELS, 4, 4))[-1][0]
    expected = ((x0[:3].permute(1, 2, 0) + 1) * 127.5).round()
    # set_alpha_to_one is false: a little noise of the first timestep stays
    assert np.abs(drawn - expected.numpy()).max() < 12


def test_the_schedule_ends_in_all_but_noise():
    alphas = NoiseSchedule.from_config(SCHEDULER).alphas_cumprod
    assert alphas[-1] / (1 - alphas[-1]) == pytest.approx(TERMINAL_SNR, rel=1e-3)
    plain = NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        | {"rescale_betas_zero_snr": True}
    ).alphas_cumprod
    near = plain > 0.01  # where a hundredth of the signal is left, the addition is nothing
    np.testing.assert_allclose(alphas[near], plain[near], rtol=0.02)


def test_the_scheduler_is_what_diffusers_reads(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    reference = DDIMScheduler.from_pretrained(tmp_path)
    alphas = NoiseSchedule.from_config(SCHEDULER).alphas_cumprod
    np.testing.assert_allclose(
        alphas, reference.alphas_cumprod.numpy(), rtol=10 * tolerances.NOISE_SCHEDULE
    )
