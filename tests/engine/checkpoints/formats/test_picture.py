import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.adapters.textual_inversion import read_embedding
from engine.checkpoints.formats.files import open_weights
from tests.support.bad_pictures import EMBEDDING, KEYWORD, carrying, chunk, picture

VECTORS = np.array(EMBEDDING["string_to_param"]["*"]["TORCHTENSOR"], np.float32)


def test_a_picture_of_pillows_is_read(tmp_path):
    path = tmp_path / "mystyle.png"
    words = PngInfo()
    words.add_text("parameters", "a cat")
    text = base64.b64encode(json.dumps(EMBEDDING).encode()).decode()
    words.add_text("sd-ti-embedding", text)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path, pnginfo=words)
    embedding = read_embedding(path)
    np.testing.assert_array_equal(embedding.vectors["text_encoder"], VECTORS)
    assert open_weights(path).metadata["name"] == "mystyle"
    assert open_weights(path).metadata["step"] == "499"


def test_a_chunk_of_another_kind_and_place_is_read(tmp_path):
    path = tmp_path / "mystyle.png"
    text = base64.b64encode(json.dumps(EMBEDDING).encode())
    path.write_bytes(picture(chunk(b"iTXt", KEYWORD + b"\0\0\0en\0word\0" + text)))
    np.testing.assert_array_equal(open_weights(path)["string_to_param.*"], VECTORS)
    end = picture()
    place = len(end) - 12  # behind the picture's own data
    path.write_bytes(end[:place] + chunk(b"tEXt", KEYWORD + b"\0" + text) + end[place:])
    np.testing.assert_array_equal(open_weights(path)["string_to_param.*"], VECTORS)


@pytest.mark.parametrize("numbers", [[1.0, 2.5], [[1.0], [2.5]], [[1, 2.5]]])
def test_vectors_and_matrices_keep_their_shapes(tmp_path, numbers):
    path = tmp_path / "mystyle.png"
    path.write_bytes(carrying({"string_to_param": {"*": {"TORCHTENSOR": numbers}}}))
    array = open_weights(path)["string_to_param.*"]
    np.testing.assert_array_equal(array, np.array(numbers, np.float32))
    assert array.dtype == np.float32


def test_the_picture_is_a_picture_still():
    assert Image.open(io.BytesIO(carrying(EMBEDDING))).size == (1, 1)
