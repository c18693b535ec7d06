import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import RequestError
from training import store
from training.captions import read_coco, read_flickr30k, read_folder
from training.dataset import CaptionedTrainingSet, load_training_set
from training.shards import read_shards
from training.store import CaptionedImages

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


def stored(records, folder, size=SIZE):
    store.write(records, folder / "data", size)
    return CaptionedImages.load(folder / "data")


def test_coco_keeps_captioned_pictures_with_all_their_captions(folder):
    data = stored(read_coco(write_coco(folder, COCO), folder), folder)
    assert tuple(data.captions) == (("a green square", "something green"), ("a red square",))
    assert data.images.shape == (2, SIZE, SIZE, 3)
    assert data.images.dtype == np.uint8
    assert (data.images[0] == COLOURS["green.png"]).all()
    assert (data.images[1] == COLOURS["red.png"]).all()


def test_the_middle_square_is_cut(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (record,) = read_flickr30k(write_table(tmp_path, "wide.png| 0| a wall"), tmp_path)
    assert (record.square(8) == 200).all()


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
    data = stored(read_flickr30k(write_table(folder, text), folder), folder)
    assert tuple(data.captions) == (("a red, square | flag .", "red"), ("blue",))
    assert (data.images[1] == COLOURS["blue.png"]).all()


def test_flickr30k_reads_the_published_line_that_lacks_a_bar(folder):
    table = write_table(folder, "blue.png| 3| blue .\nblue.png| 4   A blue square .\n")
    (record,) = read_flickr30k(table, folder)
    assert record.captions == ("blue .", "A blue square .")


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
        read_coco(write_coco(folder, values), folder)


def test_broken_json_and_missing_files_are_refused(folder):
    broken = folder / "broken.json"
    broken.write_text('{"images": [')
    with pytest.raises(RequestError, match="JSONDecodeError"):
        read_coco(broken, folder)
    with pytest.raises(RequestError, match="FileNotFoundError"):
        read_coco(folder / "none.json", folder)
    with pytest.raises(RequestError, match="cannot be read"):
        read_flickr30k(folder / "none.csv", folder)


@pytest.mark.parametrize("text", ["red.png, a red square\n", "red.png| red\n", "red.png#0 red\n"])
def test_what_is_not_flickr30k_is_refused(folder, text):
    with pytest.raises(RequestError, match=r"line 2 of .*lines read"):
        read_flickr30k(write_table(folder, f"red.png| 0| red\n{text}"), folder)


def test_an_empty_table_is_refused(folder):
    with pytest.raises(RequestError, match="at least one caption"):
        read_flickr30k(write_table(folder, ""), folder)


def test_pictures_that_are_missing_or_broken_are_named(folder):
    with pytest.raises(RequestError, match=r"pink\.png cannot be read"):
        stored(read_flickr30k(write_table(folder, "pink.png| 0| pink\n"), folder), folder)
    (folder / "pink.png").write_bytes(b"not a picture")
    with pytest.raises(RequestError, match=r"pink\.png cannot be read"):
        stored(read_flickr30k(write_table(folder, "pink.png| 0| pink\n"), folder), folder)


def test_stored_pictures_come_back_as_a_training_set(folder, tmp_path):
    stored(read_coco(write_coco(folder, COCO), folder), tmp_path)
    loaded = load_training_set(tmp_path)
    assert isinstance(loaded, CaptionedTrainingSet)
    assert [tuple(image[0, 0]) for image in loaded.images] == [(0, 255, 0), (255, 0, 0)]
    assert loaded.prompts == ["a green square", "a red square"]
    assert list(loaded.vocabulary_texts()) == ["a green square", "something green", "a red square"]
    assert list(loaded.captions(0, None)) == ["a green square", "something green"]
    assert list(tmp_path.glob("*.partial*")) == []


def test_what_is_stopped_while_it_is_stored_leaves_the_old(folder, tmp_path):
    stored(read_coco(write_coco(folder, COCO), folder), tmp_path)
    with pytest.raises(RequestError, match="cannot be read"):
        stored(read_flickr30k(write_table(folder, "red.png| 0| a\nno.png| 0| b"), folder), tmp_path)
    assert len(load_training_set(tmp_path).images) == 2


def test_one_random_caption_of_a_picture_at_a_time():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    data = CaptionedTrainingSet.of(
        CaptionedImages(images=images, captions=(("one", "two", "three"), ("other",)))
    )
    rng = np.random.default_rng(0)
    drawn = [data.caption(0, rng) for _ in range(300)]
    assert {text: drawn.count(text) > 70 for text in drawn} == dict.fromkeys(
        ("one", "two", "three"), True
    )
    assert data.caption(1, rng) == "other"


def test_a_training_set_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(RequestError, match="python -m training data"):
        load_training_set(tmp_path)


def test_captions_stand_beside_the_pictures(folder):
    (folder / "deep").mkdir()
    Image.new("RGB", (8, 8), "white").save(folder / "deep" / "white.JPG", format="JPEG")
    for name, text in {
        "red.txt": "red\n\n a red square \n",
        "green.caption": "green",
        "deep/white.txt": "white",
        "notes.md": "no caption",
    }.items():
        (folder / name).write_text(text)
    with pytest.raises(RequestError, match=r"blue\.png has no caption.*--prompt"):
        read_folder(folder)
    found = {record.name.rpartition("/")[2]: record.captions for record in read_folder(folder, "b")}
    assert found == {
        "blue.png": ("b",),
        "white.JPG": ("white",),
        "green.png": ("green",),
        "red.png": ("red", "a red square"),
    }


def test_captions_stand_in_a_table_of_json_lines(folder):
    table = folder / "metadata.jsonl"
    lines = [
        {"file_name": "red.png", "text": "red"},
        {"file_name": "blue.png", "caption": ["blue", "a blue square"], "other": 1},
        {"file_name": "red.png", "text": "a red square"},
    ]
    table.write_text("\n\n".join(map(json.dumps, lines)))
    records = list(read_folder(folder))
    assert [record.captions for record in records] == [
        ("red", "a red square"),
        ("blue", "a blue square"),
    ]
    assert records[1].image().getpixel((0, 0)) == COLOURS["blue.png"]


@pytest.mark.parametrize(
    "line",
    ["[]", "{", '{"text": "a"}', '{"file_name": "red.png"}', '{"file_name": "red.png", "text": 1}'],
)
def test_lines_that_are_none_of_a_table_are_refused(folder, line):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "red.png", "text": "a"}}\n{line}')
    with pytest.raises(RequestError, match=r"line 2 of .*a line reads"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_pictures_outside_of_the_folder_are_refused(folder, name):
    values = {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"image_id": 1, "caption": "a"}],
    }
    with pytest.raises(RequestError, match="outside of"):
        read_coco(write_coco(folder, values), folder)


def test_a_picture_is_upright(folder):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    (record,) = read_folder(folder)
    assert record.image().size == (4, 8)


# Tar files


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "png")
    return file.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_shards_hold_pictures_with_captions(tmp_path):
    write_tar(
        tmp_path / "b.tar",
        [("deep/2.json", b'{"caption": ["blue", "b"]}'), ("deep/2.jpg", png("blue"))],
    )
    write_tar(
        tmp_path / "a.tar.gz",
        [
            ("0.png", png("red")),
            ("0.txt", b"red\na red one\n"),
            ("0.cls", b"1"),
            ("1.png", png("lime")),
            ("1.json", b'{"text": "green"}'),
        ],
        "w:gz",
    )
    records = list(read_shards([tmp_path]))
    assert [r.captions for r in records] == [("red", "a red one"), ("green",), ("blue", "b")]
    colours = [record.image().getpixel((0, 0)) for record in records]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"")], "0 in .* has no caption"),
        ([("0.png", b""), ("0.txt", b"\n \n")], "has no caption"),
        ([("0.png", b""), ("0.json", b"[1]")], "has no caption"),
        ([("0.png", b""), ("0.json", b'{"caption": 3}')], "has no caption"),
        ([("0.png", b""), ("0.txt", b"\xff")], "has no caption"),
        ([("0.txt", b"a")], "holds no picture"),
        ([], "holds no picture"),
    ],
)
def test_shards_without_captioned_pictures_are_refused(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(RequestError, match=message):
        list(read_shards([path]))


def test_damaged_shards_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [("0.png", bytes(5000)), ("0.txt", b"a")]).read_bytes()
    for data in (whole[:3000], b"no tar" * 200, whole[:500]):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(RequestError, match="cannot be read as tar"):
            list(read_shards([tmp_path / "b.tar"]))
    with pytest.raises(RequestError, match="cannot be read as tar"):
        list(read_shards([tmp_path / "none.tar"]))


def test_members_that_claim_too_much_are_refused(tmp_path):
    member = tarfile.TarInfo("0.txt")
    member.size = 2**40
    (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(RequestError, match="up to 1,048,576 are read"):
        list(read_shards([tmp_path / "a.tar"]))


COUNT, LARGE = 20_000, 64  # pictures and their side: 246 MB of pixels
STREAMED = """
import resource, sys
from pathlib import Path
from training import store
from training.shards import read_shards
folder = Path(sys.argv[1])
first = next(read_shards([folder])).square(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.write(read_shards([folder]), folder / "data", 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_twenty_thousand_pictures_are_never_all_in_memory(tmp_path):
    drawn = [png((red, 10, 10)) for red in range(50)]
    for shard in range(4):
        write_tar(
            tmp_path / f"{shard}.tar",
            [
                member
                for i in range(COUNT // 4)
                for member in ((f"{i}.png", drawn[i % 50]), (f"{i}.txt", b"red %d" % i))
            ],
        )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(ran.stdout) * unit < 2**24, "a fifteenth of the pixels"
    data = load_training_set(tmp_path)
    assert data.images.shape == (COUNT, LARGE, LARGE, 3)
    assert data.images.nbytes > 2**27
    assert [tuple(data.images[i, 0, 0]) for i in (0, 7, 19_999)] == [
        (0, 10, 10), (7, 10, 10), (49, 10, 10),
    ]  # fmt: skip
    assert data.captions(19_999, None) == ("red 4999",)
