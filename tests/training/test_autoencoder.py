import dataclasses

import numpy as np
import pytest
import torch

from export.modules.autoencoder import Autoencoder
from tests.support import tolerances
from training import autoencoder
from training.autoencoder import CROP, MOVE, encode, moved, normalise, psnr, reconstruct
from training.loop import LoopSettings

TINY = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
CHANNELS = TINY.latent_channels


@pytest.fixture
def images():
    """Flat pictures of many colours with a box in each: (12, 96, 96, 3) uint8."""
    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.integers(0, 256, (12, 1, 1, 3), np.uint8), (12, 96, 96, 3)).copy()
    images[:, 30:60, 20:70] = rng.integers(0, 256, (12, 1, 1, 3), np.uint8)
    return images


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return Autoencoder(TINY).eval()


def settings(**changes):
    return LoopSettings(**{"steps": 3, "batch_size": 2, "learning_rate": 1e-3, **changes})


def test_normalised_latents_have_mean_0_and_deviation_1(untrained, images):
    before = reconstruct(untrained, images)
    _, std_before = untrained.encode(torch.zeros(1, 3, 32, 32))
    scale = encode(untrained, images).std((0, 2, 3))
    normalise(untrained, images)
    latents = encode(untrained, images)
    zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    tolerance = {"rtol": 0, "atol": tolerances.NORMALISED_LATENTS}
    torch.testing.assert_close(latents.mean((0, 2, 3)), zeros, **tolerance)
    torch.testing.assert_close(latents.std((0, 2, 3)), ones, **tolerance)
    _, std = untrained.encode(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(std * scale[:, None, None], std_before)
    after = reconstruct(untrained, images)
    assert np.abs(after.astype(int) - before).max() <= tolerances.NORMALISED_PIXELS


def test_reconstructions_have_the_shape_of_the_pictures(untrained, images):
    drawn = reconstruct(untrained, images[:, :64])
    assert drawn.shape == (12, 64, 96, 3)
    assert drawn.dtype == np.uint8
    assert encode(untrained, images[:, :64]).shape == (12, CHANNELS, 8, 12)


def test_psnr_of_a_known_error():
    zeros = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(zeros, zeros + 255) == pytest.approx(0)
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * np.log10(255))
    assert psnr(zeros, zeros) > 100


@pytest.mark.parametrize(
    ("side", "whole", "shape"),
    [
        (128, False, (8, 3, CROP, CROP)),
        (128, True, (2, 3, 128, 128)),
        (32, False, (8, 3, 32, 32)),
        (256, True, (1, 3, 256, 256)),
    ],
)
def test_crops_cost_the_same_as_whole_pictures(side, whole, shape):
    images = torch.zeros(3, side, side, 3, dtype=torch.uint8)
    crops = autoencoder.crops(images, 8, None, whole=whole)
    assert crops.shape == shape
    assert (crops == -1).all()


def test_crops_are_pieces_of_the_pictures_half_of_them_mirrored():
    columns = torch.arange(128, dtype=torch.uint8)[None, None, :, None]
    images = columns.expand(2, 128, 128, 3)
    torch.manual_seed(0)
    crops = autoencoder.crops(images, 100, None, whole=False)
    columns = ((crops + 1) * 127.5).round()[:, 0, 0]
    steps = columns.diff(dim=1)
    assert (steps.abs() == 1).all()
    assert 30 < int((steps[:, 0] == -1).sum()) < 70
    assert len(columns.min(dim=1).values.unique()) > 20


def test_whole_pictures_are_moved_and_their_edges_repeated():
    columns = torch.arange(128, dtype=torch.uint8)[None, None, :, None]
    torch.manual_seed(0)
    pictures = autoencoder.crops(columns.expand(2, 128, 128, 3), 400, None, whole=True)
    columns = ((pictures + 1) * 127.5).round()[:, 0, 0]
    moves = columns.min(dim=1).values - (127 - columns.max(dim=1).values)
    assert set(moves.int().tolist()) <= set(range(-MOVE, MOVE + 1))
    assert len(moves.unique()) > MOVE


def test_moved_pictures_are_whole_but_for_two_pixels():
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    moves = set()
    for before, after in zip(images, moved(images, np.random.default_rng(1)), strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="edge")
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if (padded[y : y + 16, x : x + 16] == after).all()
        ]
        moves.update(found)
        assert found
    assert len(moves) > 10


def test_the_loss_of_a_perfect_copy_is_its_divergence_alone():
    picture, unit = torch.rand(1, 3, 8, 8), torch.ones(1, 4, 1, 1)
    losses = autoencoder._losses(picture, picture, 0 * unit, unit)
    assert losses["loss"].item() == 0
    losses = autoencoder._losses(picture, picture, 2 * unit, unit)
    assert losses["loss"].item() == pytest.approx(2 * autoencoder.KL_WEIGHT)


def test_training_writes_checkpoint_and_samples(images, tmp_path):
    trained = autoencoder.train(images, settings(sample_steps=2), tmp_path, config=TINY)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["autoencoder-000002.png", "autoencoder.pt"]
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    torch.testing.assert_close(dict(trained.state_dict()), dict(state["ema"]))


def test_a_seed_repeats_and_a_resumed_training_draws_other_crops(images, tmp_path, monkeypatch):
    drawn = []
    crops = autoencoder.crops

    def recorded(*arguments, **options):
        drawn.append(crops(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(autoencoder, "crops", recorded)
    for folder, steps in (("a", 1), ("b", 1), ("a", 2)):
        autoencoder.train(images, settings(steps=steps), tmp_path / folder, config=TINY)
    first, again, resumed = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, resumed)
