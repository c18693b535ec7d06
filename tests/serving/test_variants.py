"""Seamless pictures and other guidance in a server: which share calls, and what they are."""

import base64
import io

import httpx
import pytest
from PIL import Image

from serving.limits import Limits
from serving.model_runner import Models
from serving.picture_request import PictureRequest
from tests.support.pictures import same
from tests.support.servers import load, serving

SIZE = {"height": 64, "width": 64}
FIELDS = {"num_inference_steps": 3, "guidance_scale": 2.0, "sampler": "euler", **SIZE}
KINDS = {
    "plain": {},
    "a seamless one": {"seamless": "both"},
    "one along x": {"seamless": "x"},
    "perturbed": {"pag_scale": 3.0},
    "projected": {"apg": [0.0, 5.0, -0.5]},
    "projected otherwise": {"apg": [0.5, 0.0, 0.0]},
    "CFG++": {"sampler": "euler_cfg_pp", "guidance_scale": 0.6},
    "CFG++ of two registers": {"sampler": "dpmpp_2m_cfg_pp", "guidance_scale": 1.5},
    "perturbed and projected": {"pag_scale": 1.0, "apg": [0.0, 5.0, 0.5]},
    "shrunk": {"deep_shrink": 0.4},
}
# Which of them are rows of one batch: all else has calls of its own.
TOGETHER = [{"projected", "projected otherwise", "CFG++", "CFG++ of two registers"}]


@pytest.fixture(scope="module")
def models():
    return Models(models={"pictogram": "pictogram"}, loras={}, load=load, limits=Limits())


@pytest.fixture(scope="module")
def pipeline():
    with load("pictogram") as opened:
        yield opened


def begun(models, kind, seed=1):
    fields = {"prompt": f"a fox {seed}", "seed": [seed], **FIELDS, **KINDS[kind]}
    (picture,) = models.unfinished_pictures(PictureRequest(fields=fields, model="pictogram"))
    picture.enter()
    return picture


def drawn(models, pictures):
    while not pictures[0].is_done:
        models.step(pictures)
    return [picture.finish().data for picture in pictures]


def test_which_are_rows_of_one_batch(models):
    buckets = {kind: begun(models, kind).bucket for kind in KINDS}
    for kind in KINDS:
        assert buckets[kind] == begun(models, kind, seed=2).bucket, "others of its kind"
    found = [{b for b in KINDS if buckets[b] == buckets[a]} for a in KINDS]
    assert [each for each in found if len(each) > 1] == TOGETHER * len(TOGETHER[0])


@pytest.mark.parametrize("kinds", [sorted(TOGETHER[0]), ["a seamless one"] * 2, ["perturbed"] * 2])
def test_rows_of_one_batch_are_what_they_are_alone(models, kinds):
    rows = [begun(models, kind, seed) for seed, kind in enumerate(kinds)]
    alone = [drawn(models, [begun(models, kind, seed)])[0] for seed, kind in enumerate(kinds)]
    assert drawn(models, rows) == alone
    assert len({*alone}) == len(kinds)


@pytest.fixture(scope="module")
def client():
    runner = Models(models={"pictogram": "pictogram"}, loras={}, load=load, limits=Limits())
    with serving(runner) as started, httpx.Client(base_url=started.url, timeout=60) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_the_native_fields_are_the_pipelines(client, pipeline, kind):
    body = {"prompt": "a fox", "seed": 4, **FIELDS, **KINDS[kind]}
    answer = client.post("/v1/images/generations", json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    fields = {**FIELDS, **KINDS[kind]}
    assert same(picture, pipeline("a fox", seed=4, **fields).images[0])
    if kind != "plain":
        assert not same(picture, pipeline("a fox", seed=4, **FIELDS).images[0])


A1111 = {
    "tiling": ({"tiling": True}, {"seamless": "both"}),
    "our name": ({"sampler_name": "euler_cfg_pp"}, {"sampler": "euler_cfg_pp"}),
    "Forge's": ({"sampler_name": "Euler CFG++"}, {"sampler": "euler_cfg_pp"}),
    "with noise": ({"sampler_name": "Euler a CFG++"}, {"sampler": "euler_a_cfg_pp"}),
}


@pytest.mark.parametrize("name", A1111)
def test_automatic1111s_requests_are_the_pipelines(client, pipeline, name):
    given, fields = A1111[name]
    body = {"prompt": "a fox", "seed": 4, "steps": 3, "cfg_scale": 2.0, **SIZE}
    body |= {"sampler_name": "Euler", "scheduler": "Karras", **given}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    told = {**FIELDS, "schedule": "karras", "noise": "cuda", **fields}
    assert same(picture, pipeline("a fox", seed=4, **told).images[0])


def test_what_cannot_be_drawn_together_is_one_sentence(client):
    body = {"prompt": "a fox", "seed": 4, **FIELDS, "deep_shrink": 0.4, "seamless": "x"}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert "deep_shrink and seamless came together" in said


def test_capabilities_say_the_axes(client):
    said = client.get("/api/v1/capabilities").json()
    assert said["seamless"] == ["x", "y", "both"]
    assert "euler_cfg_pp" in said["samplers"]
