import numpy as np
import pytest

from training.quality import features, ranks


@pytest.fixture
def originals():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


def test_features_are_averages_of_cells():
    images = np.zeros((2, 16, 24, 3), np.uint8)
    images[1, 8:, 16:, 2] = 255
    values = features(images)
    assert values.shape == (2, 2 * 3 * 3)
    assert values[0].max() == 0
    assert values[1].reshape(2, 3, 3)[1, 2].tolist() == [0, 0, 1]
    assert values[1].sum() == 1


def test_exact_originals_rank_first(originals):
    assert ranks(originals, originals).tolist() == [1] * 5


def test_detail_inside_a_cell_does_not_count(originals):
    rolled = originals.reshape(5, 4, 8, 4, 8, 3)[:, :, ::-1].reshape(originals.shape)
    assert ranks(rolled, originals).tolist() == [1] * 5


def test_a_swapped_pair_does_not_rank_first(originals):
    places = ranks(originals[[1, 0, 2, 3, 4]], originals)
    assert (places[:2] > 1).all()
    assert places[2:].tolist() == [1, 1, 1]


def test_the_farthest_ranks_last():
    originals = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 200)])
    drawn = np.stack([originals[2], originals[2], originals[2]])
    assert ranks(drawn, originals).tolist() == [3, 2, 1]
