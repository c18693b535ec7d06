"""IDX files: what MNIST's and Fashion-MNIST's folders hold, and what no folder should."""

import gzip
import struct

import numpy as np
import pytest

from engine.errors import RequestError
from tests.support.digits import write_digits
from training.idx import LabelledPictures, read_idx, write_idx

HEAD = bytes([0, 0, 8, 3])


def idx(*dimensions, data=b"", head=HEAD):
    return head + struct.pack(f">{len(dimensions)}I", *dimensions) + data


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_a_folder_is_read_as_it_was_written(tmp_path, ending, dot):
    images, labels = write_digits(tmp_path, per_class=2, ending=ending, dot=dot)
    read = LabelledPictures.read(tmp_path, "train", 10)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
    assert len(LabelledPictures.read(tmp_path, "test", 10).images) > 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "does not begin as an IDX file"),
        (HEAD + b"\0\0", "does not begin as an IDX file"),
        (idx(1, 8, head=bytes([0, 0, 8, 2])), "does not begin as an IDX file"),
        (idx(1, 1, 1, head=bytes([0, 0, 13, 3]), data=b"1234"), "does not begin as an IDX file"),
        (b"PK\3\4" + b"0" * 40, "does not begin as an IDX file"),
        (idx(2, 8, 8, data=b"0" * 127), "2 x 8 x 8 bytes, and holds less"),
        (idx(2, 8, 8, data=b"0" * 129), "2 x 8 x 8 bytes, and holds more"),
        (idx(*[2**32 - 1] * 3), "and holds less"),
        (idx(2**31, 2, 1, data=b"0"), "and holds less"),
        (gzip.compress(idx(2**32 - 1, 28, 28), mtime=0), "and holds less"),
        (gzip.compress(idx(1, 8, 8, data=b"0" * 64), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b" + b"0" * 20, "cannot be read"),
        (
            gzip.compress(idx(1, 1, 1, data=b"0" * 10**7), mtime=0),
            "1 x 1 x 1 bytes, and holds more",
        ),
    ],
)
def test_files_that_are_none_are_one_sentence(tmp_path, data, said):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=said) as caught:
        read_idx(path, 3)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit_are_one_sentence(tmp_path):
    def said(images, labels, match, classes=10):
        write_idx(tmp_path / "train-images-idx3-ubyte", np.asarray(images, np.uint8))
        write_idx(tmp_path / "train-labels-idx1-ubyte", np.asarray(labels, np.uint8))
        with pytest.raises(RequestError, match=match):
            LabelledPictures.read(tmp_path, "train", classes)

    with pytest.raises(RequestError, match="has no train-images-idx3-ubyte"):
        LabelledPictures.read(tmp_path, "train", 10)
    square = np.zeros((2, 8, 8))
    said(square, [0, 1, 2], "2 pictures and train-labels-idx1-ubyte 3 labels")
    said(square[:0], [], "which is not empty")
    said(np.zeros((2, 8, 12)), [0, 1], "8 x 12 pixels; squares are expected")
    said(np.zeros((2, 10, 10)), [0, 1], "10 x 10 pixels")
    said(np.zeros((2, 68, 68)), [0, 1], "from 8 to 64")
    said(square, [0, 10], "the label 10, beyond the 10 classes; give --classes")
    said(square, [0, 3], "beyond the 2 classes", classes=2)
