import numpy as np
import pytest

from training import pictograms
from training.dataset import EVERYDAY_SHARE, PictogramTrainingSet, load_training_set
from training.pictograms import (
    HELD_OUT,
    SIZE,
    STYLES,
    Pictograms,
    all_captions,
    build,
    caption,
    hold_out,
    random_caption,
    render,
)

SQUARE = '<path fill="{}" d="M0 0h8v8H0z"/>'
FACTS = {
    "🍎": {"name": "Red Apple", "slug": "red_apple", "group": "Food & Drink"},
    "🐱": {"name": "cat’s face", "slug": "cat_s_face", "group": "Animals & Nature"},
    "🕧": {"name": "twelve-thirty", "slug": "twelve_thirty", "group": "Travel & Places"},
    "🇫🇷": {"name": "flag France", "slug": "flag_france", "group": "Flags"},
    "🧩": {"name": "puzzle", "slug": "puzzle", "group": "Activities"},
}


def icon_set(colour):
    body = {"body": SQUARE.format(colour)}
    return {
        "prefix": colour,
        "width": 8,
        "height": 8,
        "icons": {
            "apple": body,
            "cat-s-face": body,
            "twelve-thirty": body,
            "flag-france": body,
            **({"puzzle": body} if colour != "blue" else {}),  # not in all four sets
        },
        "aliases": {"red-apple": {"parent": "apple"}, "puzzle": {"parent": "apple", "hFlip": True}},
    }


@pytest.fixture
def fetched(monkeypatch):
    """Stand in for the packages: four sets of plain squares."""
    pytest.importorskip("resvg_py")
    files = {
        "data-by-emoji.json": FACTS,
        "dist/emoji-en-US.json": {"🍎": ["red_apple", "fruit", "a1"]},
    }
    colours = dict(zip(pictograms.ICON_SETS, ("red", "lime", "blue", "black"), strict=True))
    monkeypatch.setattr(pictograms, "fetch", lambda package, folder: package)
    monkeypatch.setattr(
        pictograms,
        "read_member",
        lambda package, member: icon_set(colours[package]) if "icons" in member else files[member],
    )


def test_build_takes_what_all_sets_share(fetched, tmp_path):
    data = build(tmp_path, everyday=False)
    assert data.names == ("red apple", "cat's face", "twelve-thirty")
    assert data.keywords == (("fruit",), (), ())
    assert data.images.shape == (3, 4, SIZE, SIZE, 3)
    assert data.images.dtype == np.uint8
    middles = data.images[0, :, SIZE // 2, SIZE // 2]
    assert middles.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]
    assert (data.images[:, :, 0, 0] == 255).all()


def test_build_takes_everyday_subjects(fetched, tmp_path):
    assert build(tmp_path, everyday=True).names == ("red apple", "cat's face")


def test_saved_pictograms_come_back(fetched, tmp_path):
    data = build(tmp_path, everyday=False)
    data.save(tmp_path / "data.npz")
    loaded = Pictograms.load(tmp_path / "data.npz")
    assert (loaded.names, loaded.keywords) == (data.names, data.keywords)
    np.testing.assert_array_equal(loaded.images, data.images)
    np.testing.assert_array_equal(loaded.held_out, data.held_out)
    np.testing.assert_array_equal(loaded.everyday, data.everyday)
    training = load_training_set(tmp_path)
    assert isinstance(training, PictogramTrainingSet)
    assert len(training.images) == len(training.pairs) == 12 - data.held_out.sum()


def test_training_captions_tell_what_the_picture_shows(fetched, tmp_path):
    data = PictogramTrainingSet.of(build(tmp_path, everyday=False))
    rng = np.random.default_rng(0)
    for index, (subject, style) in enumerate(data.pairs):
        np.testing.assert_array_equal(data.images[index], data.pictograms.images[subject, style])
        assert data.pictograms.names[subject] in data.caption(index, rng)


def test_pictures_are_drawn_inside_a_white_margin():
    pytest.importorskip("resvg_py")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{SQUARE.format("red")}</svg>'
    pixels = render(svg)
    inside = (pixels == (255, 0, 0)).all(axis=2)
    assert inside[4:-4, 4:-4].all()
    assert inside.sum() == 120 * 120
    assert (pixels[~inside] == 255).all()


def test_held_out_pairs_leave_each_subject_three_styles():
    listed = HELD_OUT.read_text(encoding="utf-8").splitlines()
    names = sorted({line.rsplit(", ", 1)[0] for line in listed})
    assert len(listed) == len(names) == 240
    held_out = hold_out(["another", *names])
    assert held_out.shape == (241, 4)
    assert held_out.sum(axis=1).tolist() == [0, *[1] * 240]
    assert held_out.sum(axis=0).tolist() == [60] * 4


def test_everyday_subjects_have_their_share_of_the_draws(fetched, tmp_path):
    data = PictogramTrainingSet.of(build(tmp_path, everyday=False))
    everyday = data.pictograms.everyday[data.pairs[:, 0]]
    assert everyday.tolist() == [True] * 8 + [False] * 4
    assert data.draws.sum() == pytest.approx(1)
    assert data.draws[everyday].sum() == pytest.approx(EVERYDAY_SHARE)
    assert PictogramTrainingSet.of(build(tmp_path, everyday=True)).draws is None


def test_random_captions_have_these_forms_and_no_others():
    rng = np.random.default_rng(0)
    drawn = [random_caption("owl", ("bird", "night"), 2, rng) for _ in range(4000)]
    subjects = ("owl", "an owl", "owl bird", "owl night")
    forms = ("{}", "{}, noto style", "noto style {}", "{} noto")
    assert set(drawn) == {form.format(subject) for form in forms for subject in subjects}
    without_style = sum("noto" not in text for text in drawn) / len(drawn)
    assert without_style == pytest.approx(1 / 8, abs=0.02)
    assert drawn.count("owl, noto style") > len(drawn) / 4


def test_random_captions_need_no_keywords():
    rng = np.random.default_rng(0)
    drawn = {random_caption("cat", (), 0, rng) for _ in range(500)}
    assert {"cat", "a cat", "a cat, fluent style"} <= drawn
    assert all("an cat" not in text for text in drawn)


def test_captions_and_their_words():
    assert caption("red apple", "noto") == "red apple, noto style"
    assert caption("red apple", None) == "red apple"
    data = Pictograms(
        names=("owl",),
        keywords=(("bird",),),
        images=np.zeros(0),
        held_out=np.zeros(0),
        everyday=np.ones(1, bool),
    )
    words = set(" ".join(all_captions(data)).replace(",", "").split())
    assert words == {"owl", "a", "an", "style", *STYLES}
