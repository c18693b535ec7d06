import json

import numpy as np
import pytest
from PIL import Image

from engine.errors import RequestError
from training.captions import CaptionedImages, read_coco, read_flickr30k
from training.dataset import CaptionedTrainingSet, load_training_set

SIZE = 16
COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}
COCO = {
    "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(COLOURS)],
    "annotations": [
        {"image_id": 11, "id": 1, "caption": "a green square"},
        {"image_id": 10, "id": 2, "caption": "a red square\n"},
        {"image_id": 11, "id": 3, "caption": "something green"},
    ],
}


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 24), colour).save(tmp_path / name)
    return tmp_path


def write_coco(folder, values):
    path = folder / "captions.json"
    path.write_text(json.dumps(values))
    return path


def write_table(folder, text):
    path = folder / "results.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_coco_keeps_captioned_pictures_with_all_their_captions(folder):
    data = read_coco(write_coco(folder, COCO), folder, SIZE)
    assert data.captions == (("a green square", "something green"), ("a red square",))
    assert data.images.shape == (2, SIZE, SIZE, 3)
    assert data.images.dtype == np.uint8
    assert (data.images[0] == COLOURS["green.png"]).all()
    assert (data.images[1] == COLOURS["red.png"]).all()


def test_the_middle_square_is_cut(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    data = read_flickr30k(write_table(tmp_path, "wide.png| 0| a wall"), tmp_path, 8)
    assert (data.images == 200).all()


@pytest.mark.parametrize(
    "text",
    [
        "image_name| comment_number| comment\nred.png| 0| a red, square | flag .\n"
        "red.png| 1| red\nblue.png| 0| blue\n",
        "red.png#0\ta red, square | flag .\nred.png#1\tred\n\nblue.png#0\tblue\n",
    ],
    ids=["table", "tokens"],
)
def test_flickr30k_in_both_layouts(folder, text):
    data = read_flickr30k(write_table(folder, text), folder, SIZE)
    assert data.captions == (("a red, square | flag .", "red"), ("blue",))
    assert (data.images[1] == COLOURS["blue.png"]).all()


def test_flickr30k_reads_the_published_line_that_lacks_a_bar(folder):
    table = write_table(folder, "blue.png| 3| blue .\nblue.png| 4   A blue square .\n")
    assert read_flickr30k(table, folder, SIZE).captions == (("blue .", "A blue square ."),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**COCO, "annotations": [{"image_id": 99, "caption": "?"}]}, "KeyError: 99"),
        ({"images": []}, "annotations"),
        ([], "TypeError"),
        ({**COCO, "annotations": [{"image_id": 10, "caption": None}]}, "AttributeError"),
        ({**COCO, "annotations": []}, "at least one caption"),
    ],
    ids=["unknown image", "no annotations", "a list", "no text", "empty"],
)
def test_what_is_not_coco_is_refused(folder, values, message):
    with pytest.raises(RequestError, match=message):
        read_coco(write_coco(folder, values), folder, SIZE)


def test_broken_json_and_missing_files_are_refused(folder):
    broken = folder / "broken.json"
    broken.write_text('{"images": [')
    with pytest.raises(RequestError, match="JSONDecodeError"):
        read_coco(broken, folder, SIZE)
    with pytest.raises(RequestError, match="FileNotFoundError"):
        read_coco(folder / "none.json", folder, SIZE)
    with pytest.raises(RequestError, match="cannot be read"):
        read_flickr30k(folder / "none.csv", folder, SIZE)


@pytest.mark.parametrize("text", ["red.png, a red square\n", "red.png| red\n", "red.png#0 red\n"])
def test_what_is_not_flickr30k_is_refused(folder, text):
    with pytest.raises(RequestError, match=r"line 2 of .*lines read"):
        read_flickr30k(write_table(folder, f"red.png| 0| red\n{text}"), folder, SIZE)


def test_an_empty_table_is_refused(folder):
    with pytest.raises(RequestError, match="at least one caption"):
        read_flickr30k(write_table(folder, ""), folder, SIZE)


def test_pictures_that_are_missing_or_broken_are_named(folder):
    with pytest.raises(RequestError, match=r"pink\.png cannot be read"):
        read_flickr30k(write_table(folder, "pink.png| 0| pink\n"), folder, SIZE)
    (folder / "pink.png").write_bytes(b"not a picture")
    with pytest.raises(RequestError, match=r"pink\.png cannot be read"):
        read_flickr30k(write_table(folder, "pink.png| 0| pink\n"), folder, SIZE)


def test_saved_pictures_come_back_as_a_training_set(folder, tmp_path):
    data = read_coco(write_coco(folder, COCO), folder, SIZE)
    data.save(tmp_path / "data.npz")
    assert CaptionedImages.load(tmp_path / "data.npz").captions == data.captions
    loaded = load_training_set(tmp_path / "data.npz")
    assert isinstance(loaded, CaptionedTrainingSet)
    np.testing.assert_array_equal(loaded.images, data.images)
    assert loaded.prompts == ["a green square", "a red square"]
    assert loaded.vocabulary_texts() == ["a green square", "something green", "a red square"]
    assert list(tmp_path.glob("*.partial*")) == []


def test_one_random_caption_of_a_picture_at_a_time():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    captions = (("one", "two", "three"), ("other",))
    data = CaptionedTrainingSet.of(CaptionedImages(images=images, captions=captions))
    rng = np.random.default_rng(0)
    drawn = [data.caption(0, rng) for _ in range(300)]
    assert {text: drawn.count(text) > 70 for text in drawn} == dict.fromkeys(captions[0], True)
    assert data.caption(1, rng) == "other"


def test_a_training_set_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(RequestError, match="python -m training data"):
        load_training_set(tmp_path / "data.npz")
