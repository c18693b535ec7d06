"""Models' files that are deleted, replaced or written over while they are served; a full disk."""

import os
import shutil
import tempfile
from pathlib import Path

import httpx
import pytest

from engine.model import find_model
from serving.errors import UnavailableError
from serving.limits import Limits
from serving.model_files import is_same, is_written_over, list_files
from serving.model_runner import Models
from serving.picture_request import PictureRequest
from tests.support.servers import SlowStudio, load, serving


@pytest.fixture
def models(tmp_path):
    """A copy of the model that ships, whose files may be changed, as a server began with it."""
    folder = tmp_path / "model"
    shutil.copytree(find_model("pictogram"), folder)
    return Models(
        models={"mine": str(folder)},
        loras={},
        load=load,
        limits=Limits(),
        files={str(folder): list_files(folder)},
    )


def drawn(models):
    fields = {"prompt": "a cat", "num_inference_steps": 1, "seed": [1]}
    (picture,) = models.unfinished_pictures(PictureRequest(fields=fields, model="mine"))
    picture.enter()
    models.step([picture])
    return picture.finish().data


def weights(models):
    return max(models_folder(models).rglob("*.safetensors"), key=lambda path: path.stat().st_size)


def models_folder(models):
    return Path(models.models["mine"])


def test_what_is_loaded_outlives_its_files(models):
    before = drawn(models)
    file = weights(models)
    other = file.with_name("other")
    other.write_bytes(b"nothing")
    other.replace(file)
    assert drawn(models) == before, "another file in its place"
    shutil.rmtree(models_folder(models))
    assert drawn(models) == before, "deleted"
    models._open.clear()
    with pytest.raises(UnavailableError, match="mine is another file now") as refused:
        drawn(models)
    assert refused.value.code == "model_unavailable"
    assert models.models["mine"] not in refused.value.message


def test_a_file_that_is_written_over_is_refused_where_it_is_loaded(models):
    drawn(models)
    os.utime(weights(models), ns=(1, 1))
    with pytest.raises(UnavailableError):
        drawn(models)


def test_which_files_are_others(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    before = list_files(file)
    assert is_same(file, before)
    assert not is_written_over(file, before)
    file.write_bytes(b"four")
    assert is_written_over(file, before)
    file.unlink()
    assert not is_same(file, before)
    assert not is_written_over(file, before)
    assert list_files(file) == {}


def test_an_upload_needs_no_disk(monkeypatch):
    """Files of a form are of any size within the limit, and no file is opened for them."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with serving(SlowStudio(0)) as running, httpx.Client(base_url=running.url) as client:
        noise = os.urandom(4 << 20)
        answer = client.post(
            "/v1/images/edits", data={"prompt": "p"}, files={"image": ("a.png", noise)}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_image")
