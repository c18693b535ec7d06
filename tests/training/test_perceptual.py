"""Distances between pictures by what a network sees, and the network of the loss."""

import numpy as np
import pytest
import torch

from training import perceptual
from training.loop import LoopSettings
from training.perceptual import Classifier, distance, mean_distance


def two_sizes(images):
    return [3 * images, images.mean((2, 3), keepdim=True) ** 2]


def test_the_distance_is_of_directions_at_each_place_summed_over_the_sizes():
    torch.manual_seed(0)
    a, b = torch.rand(2, 4, 3, 5, 5)
    expected = 0.0
    for seen in two_sizes(a), two_sizes(7 * a):
        for of_a, of_b in zip(seen, two_sizes(b), strict=True):
            of_a, of_b = of_a.double(), of_b.double()
            cosine = (of_a * of_b).sum(1) / (of_a.norm(dim=1) * of_b.norm(dim=1))
            expected += float((2 - 2 * cosine).mean()) / 2
    assert float(distance(two_sizes, a, b)) == pytest.approx(expected, rel=1e-5)
    assert distance(two_sizes, a, a) == 0
    assert float(distance(two_sizes, 7 * a, b)) == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_over_all_pictures_also_of_a_last_batch(monkeypatch):
    monkeypatch.setattr(perceptual, "BATCH", 4)
    a, b = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), np.uint8)
    each = [mean_distance(two_sizes, a[[i]], b[[i]]) for i in range(6)]
    assert mean_distance(two_sizes, a, b) == pytest.approx(np.mean(each), rel=1e-5)


def test_a_classifier_learns_what_it_is_shown(tmp_path):
    """Two subjects, a square and a stripe, in two styles, red and blue."""
    images = np.full((4, 64, 64, 3), 255, np.uint8)
    for subject, area in enumerate((np.s_[16:48, 16:48], np.s_[:, 28:36])):
        for style, colour in enumerate(((255, 0, 0), (0, 0, 255))):
            images[2 * subject + style][area] = colour
    labels = np.array([(subject, style) for subject in range(2) for style in range(2)])
    settings = LoopSettings(
        steps=60, batch_size=8, learning_rate=5e-3, warmup_steps=5, ema_decay=0.8
    )
    classifier = perceptual.train(images, labels, settings, tmp_path, draws=np.ones(4))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    subjects, styles = classifier.logits(pixels)
    assert subjects.argmax(1).tolist() == labels[:, 0].tolist()
    assert styles.argmax(1).tolist() == labels[:, 1].tolist()
    assert [part.shape[2] for part in classifier(pixels)] == [32, 16, 8, 4]
    again = perceptual.train(images, labels, settings, tmp_path)  # it is there
    torch.testing.assert_close(dict(again.state_dict()), dict(classifier.state_dict()))


def test_what_is_shown_are_squares_of_the_pictures(monkeypatch):
    monkeypatch.setattr(perceptual, "NOISE", 0.0)
    ramp = torch.linspace(-1, 1, 64).expand(64, 3, 64, 64)
    torch.manual_seed(0)
    widths = perceptual._shown(ramp).amax((1, 2, 3)) - perceptual._shown(ramp).amin((1, 2, 3))
    assert widths.min() < 1.3
    shown = perceptual._shown(ramp)
    assert shown.shape == ramp.shape
    slopes = shown[:, 0, 0, 40] - shown[:, 0, 0, 20]
    assert 15 < (slopes < 0).sum() < 49  # mirrored half of the time
    assert slopes.abs().min() >= 20 * 2 / 63 * perceptual.SMALLEST - 1e-4
    monkeypatch.setattr(perceptual, "SMALLEST", 1.0)
    same = perceptual._shown(ramp)
    plain = torch.where((same[:, :1, :1, :1] < 0), same, same.flip(3))
    torch.testing.assert_close(plain, ramp, atol=1e-5, rtol=0)


def test_features_are_of_each_convolution():
    seen = Classifier(5, 4)(torch.zeros(2, 3, 32, 48))
    assert [tuple(part.shape) for part in seen] == [
        (2, width, 16 // 2**i, 24 // 2**i) for i, width in enumerate(perceptual.WIDTHS)
    ]
