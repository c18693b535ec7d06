"""OpenAI's client for Node.js: generations, edits, streams, errors, and leaving.

LATENTRT_NODE_OPENAI names the folder of the npm package `openai`; `.ci/run` installs it.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.named_requests import IMAGE, MASK
from tests.support.servers import load, models, serving

VARIABLE = "LATENTRT_NODE_OPENAI"
SCRIPT = Path(__file__).with_name("openai_client.mjs")
NODE = shutil.which("node")
PACKAGE = os.environ.get(VARIABLE, "")

if NODE is None or not Path(PACKAGE, "index.mjs").is_file():
    pytest.skip(
        f"needs node, and {VARIABLE} to name the npm package openai (`npm install openai`)",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def running():
    with serving(models()) as started:
        yield started


@pytest.fixture(scope="module")
def told(running, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    alpha = Image.fromarray(255 - np.asarray(MASK.convert("L")))
    mask = Image.merge("RGBA", (*IMAGE.split()[:3], alpha))
    for name, image in (("image", IMAGE), ("mask", mask)):
        image.save(folder / f"{name}.png")
    command = [NODE, SCRIPT, running.url, PACKAGE, folder / "image.png", folder / "mask.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pipeline():
    return load("pictogram")


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_a_generation_is_the_pipelines_picture_bit_for_bit(told, pipeline):
    options = {"seed": 7, "num_inference_steps": 4, "height": 128, "width": 128}
    drawn = pipeline("a hat", num_images_per_prompt=2, **options).images
    assert len(told["generated"]) == 2
    for text, image in zip(told["generated"], drawn, strict=True):
        np.testing.assert_array_equal(pixels(text), np.asarray(image))


def test_an_edit_keeps_what_is_outside_the_mask(told):
    (text,) = told["edited"]
    edited, before = pixels(text), np.asarray(IMAGE.convert("RGB"))
    painted = np.asarray(MASK.convert("L")) > 0
    np.testing.assert_array_equal(edited[~painted], before[~painted])
    assert (edited[painted] != before[painted]).any()


def test_a_stream_has_its_partial_images_and_then_the_picture(told, pipeline):
    *partials, last = told["events"]
    assert [event["index"] for event in partials] == [0, 1]
    assert {event["type"] for event in partials} == {"image_generation.partial_image"}
    assert {pixels(event["b64_json"]).ndim for event in partials} == {3}
    assert (last["type"], last["index"]) == ("image_generation.completed", None)
    (image,) = pipeline("a hat", seed=7, num_inference_steps=9).images
    np.testing.assert_array_equal(pixels(last["b64_json"]), np.asarray(image))


@pytest.mark.parametrize(
    ("what", "name", "status", "code", "param"),
    [
        ("unknown_model", "NotFoundError", 404, "model_not_found", "model"),
        ("bad_size", "BadRequestError", 400, "invalid_request", "size"),
        ("bad_sampler", "BadRequestError", 400, "invalid_request", "sampler"),
        ("too_many", "BadRequestError", 400, "too_much", "n"),
    ],
)
def test_errors_are_the_clients_own(told, what, name, status, code, param):
    error = told[what]
    assert (error["name"], error["status"]) == (name, status)
    assert (error["code"], error["param"]) == (code, param)


def test_who_leaves_frees_the_rows(told, running):
    assert told["aborted"] == "APIUserAbortError"
    assert told["left_after"] == "image_generation.partial_image"
    assert told["models"] == ["pictogram", "other"]
    end = time.monotonic() + 10
    while running.service.jobs.unfinished() or running.loop.on_board or running.loop.waiting:
        assert time.monotonic() < end, "a row is drawn for nobody"
        time.sleep(0.01)
    text = running.service.metrics.text().decode()
    assert 'latentrt_cancelled_total{why="left"} 2.0' in text
    assert "latentrt_pictures_total 4.0" in text, "those of who stayed, and no other"
