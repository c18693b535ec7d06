import numpy as np
import pytest

from training.pictograms import STYLES, Pictograms
from training.quality import copied, features, ranks


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


def test_copying_takes_the_best_other_style():
    styles = len(STYLES)
    images = np.random.default_rng(1).integers(0, 256, (styles, styles, 8, 8, 3), np.uint8)
    images[:, 1] = images[:, 0]  # the first two styles are drawn alike
    images[2, :2] = images[3, 3]  # the third subject's others are another subject's original
    images[2, 3] = images[3, 3]
    pairs = np.stack([np.arange(styles)] * 2, axis=1)
    data = Pictograms(
        names=("a", "b", "c", "d"), keywords=((),) * 4, images=images,
        held_out=np.eye(styles, dtype=bool), everyday=np.ones(styles, bool),
    )  # fmt: skip
    found = copied(data, pairs)
    assert found[STYLES[0]]["top_1"] == found[STYLES[1]]["top_1"] == 1.0
    assert found[STYLES[2]]["top_1"] == 0.0, "its own original does not count"
    means = [found[style]["top_1"] for style in STYLES]
    assert found["all"]["top_1"] == pytest.approx(np.mean(means))
