"""Image prompts in a server, against the pipeline's own pictures, bit for bit."""

import base64
import io
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image
from safetensors.numpy import save_file

from engine.configs.image_encoder import ImageEncoderConfig
from engine.configs.ip_adapter import IPAdapterConfig
from engine.errors import RequestError
from engine.model import Model
from runtime import ImagePrompt, Pipeline
from serving.child import runner
from serving.engine_settings import EngineSettings
from serving.frames import of_order, to_order
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.model_memory import weight_bytes
from serving.model_runner import Models
from serving.operator_files import find_ip_adapters
from serving.options import engine_settings, make_parser
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.steering import ImagePromptRequest
from tests.support import clients
from tests.support.clients import FreshScripts, base64_of, bytes_of, refusal
from tests.support.ip_adapters import (
    small_encoder,
    small_ip_adapter,
    trace_ip_graphs,
    write_ip_adapter,
)
from tests.support.pictures import drawing, same
from tests.support.servers import serving
from tests.support.small_models import SMALL
from tests.support.small_pictures import DEPRECATIONS, LEFT, PIXELS, SETTINGS, write_small

pytestmark = DEPRECATIONS
PICTURE = drawing(40, 28)
OTHER = drawing(28, 28).transpose(1)
SIZE = {"height": PIXELS, "width": PIXELS}
FIELDS = {"num_inference_steps": 4, "guidance_scale": 5.0, "sampler": "ddim", **SIZE}


@pytest.fixture(scope="module")
def made(place):
    """Write a small model and a folder of IP-Adapters: two for it, one of XL, one of a face."""
    small, file, graphs = write_small("sd1", place)
    folder = place / "adapters"
    folder.mkdir()
    for kind in ("linear", "plus"):
        write_ip_adapter(small_ip_adapter(small, kind), folder / f"{kind}.safetensors")
    write_ip_adapter(small_ip_adapter(SMALL["xl"], "linear"), folder / "xl.bin")
    face = {f"image_proj.proj.{i}.weight": np.ones((8, 8), np.float32) for i in (0, 2)}
    face |= {"ip_adapter.1.to_k_ip.weight": np.ones((8, 8), np.float32)}
    save_file(face, folder / "face.safetensors")
    small_encoder().save_pretrained(folder / "image_encoder")
    trace_ip_graphs(Model.open(file), graphs)
    load = partial(Pipeline.load, graphs=graphs, settings=SETTINGS)
    adapters = {kind: folder / f"{kind}.safetensors" for kind in ("linear", "plus")}
    return file, folder, load, load(file, ip_adapters=adapters)


def models_of(made):
    file, folder, load, _ = made
    adapters, encoders = find_ip_adapters([folder], [])
    return Models(
        models={"small": file},
        loras={},
        ip_adapters={name: Path(path) for name, path in adapters.items()},
        image_encoders={name: Path(path) for name, path in encoders.items()},
        load=load,
        limits=Limits(),
    )


@pytest.fixture
def models(made):
    return models_of(made)


@pytest.fixture(scope="module")
def running(made):
    catalog = Catalog(models=("small",), loras=(), ip_adapters=("linear", "plus", "xl"))
    with serving(models_of(made), catalog=catalog) as started:
        yield started


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=60) as opened:
        yield opened


@pytest.fixture
def draw(made):
    *_, pipeline = made
    return lambda prompt="a fox", **fields: pipeline(prompt, **{**FIELDS, **fields}).images[0]


def sent(name="linear", picture=PICTURE, **fields):
    return {"name": name, "picture": base64_of(picture), **fields}


def submitted(client, **fields):
    return clients.submitted(client, prompt="a fox", **{**FIELDS, **fields})


def fetched(client, job):
    file, said = clients.fetched(client, job)
    return Image.open(io.BytesIO(file)), said


def test_pictures_with_other_image_prompts_and_none_are_what_they_are_alone(client, draw):
    linear = ImagePrompt(adapter="linear", image=PICTURE, scale=0.7)
    late = ImagePrompt(adapter="linear", image=OTHER, scale=(0.2, 1.0), start=0.5, mask=LEFT)
    several = ImagePrompt(adapter="plus", image=[PICTURE, OTHER], end=0.5)
    asked = [
        ([], ()),
        ([sent(scale=0.7)], (linear,)),
        ([sent(picture=OTHER, scale=[0.2, 1.0], start=0.5, mask=base64_of(LEFT))], (late,)),
        ([sent(scale=0.7), sent("plus", end=0.5)], (linear, several)),
    ]
    asked[3][0][1]["picture"] = [base64_of(PICTURE), base64_of(OTHER)]
    jobs = [submitted(client, seed=n, image_prompts=given) for n, (given, _) in enumerate(asked)]
    for seed, (job, (_, given)) in enumerate(zip(jobs, asked, strict=True)):
        picture, said = fetched(client, job)
        assert same(picture, draw(seed=seed, image_prompts=given))
        assert said["settings"].get("image_prompts", []) == [each.text for each in given]
    assert not same(picture, draw(seed=seed))


def test_openais_images_take_them_too(client, draw):
    body = {"prompt": "a fox", "seed": 4, **FIELDS, "image_prompts": [sent("plus")]}
    answer = client.post("/v1/images/generations", json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    given = [ImagePrompt(adapter="plus", image=PICTURE)]
    assert same(picture, draw(seed=4, image_prompts=given))


def begun(models, *given, prompt="a fox", **more):
    request = PictureRequest(
        fields={"prompt": prompt, "seed": [1], **FIELDS},
        model="small",
        image_prompts=[
            ImagePromptRequest(adapter=name, pictures=[bytes_of(picture)])
            for name, picture in given
        ],
        **more,
    )
    (picture,) = models.unfinished_pictures(request)
    picture.enter()
    return picture


def finished(models, picture):
    while not picture.is_done:
        models.step([picture])
    return picture.finish().data


def test_which_are_rows_of_one_batch(models):
    """Other pictures seen by as many tokens share calls, and what has none is drawn beside."""
    one, two = begun(models, ("linear", PICTURE)), begun(models, ("linear", OTHER), prompt="a cat")
    more, none = begun(models, ("plus", PICTURE)), begun(models)
    assert one.bucket == two.bucket
    assert len({each.bucket for each in (one, more, none)}) == 3
    while not one.is_done:
        models.step([one, two])
    alone = [
        finished(models, begun(models, ("linear", PICTURE))),
        finished(models, begun(models, ("linear", OTHER), prompt="a cat")),
    ]
    assert [one.finish().data, two.finish().data] == alone
    assert finished(models, none) not in alone


def test_they_count_among_the_bytes_and_are_let_go_of(models):
    plain = begun(models)
    alone = weight_bytes(plain.pipeline)
    one = begun(models, ("linear", PICTURE))
    assert one.pipeline is plain.pipeline, "an image prompt changes no weight"
    with_one = weight_bytes(one.pipeline)
    both = begun(models, ("plus", PICTURE))
    assert alone < with_one < weight_bytes(both.pipeline)
    kinds = [type(config) for config in both.pipeline.ip_adapters.configs]
    assert kinds == [IPAdapterConfig, IPAdapterConfig, ImageEncoderConfig], "one encoder"
    models.budget = with_one
    with pytest.raises(RequestError, match="image_prompts: xl does not fit the model small"):
        begun(models, ("xl", PICTURE))
    assert finished(models, one), "pictures on their way keep theirs"


BROKEN = base64.b64encode(b"\x89PNG no picture").decode()
REFUSED = {
    "another family": ({"image_prompts": [sent("xl")]}, "xl does not fit the model small"),
    "none": ({"image_prompts": [sent("../a")]}, "there is no IP-Adapter '../a'"),
    "nine": ({"image_prompts": [sent()] * 9}, "image_prompts has 9 pictures; up to 8"),
    "no pictures": ({"image_prompts": [{**sent(), "picture": []}]}, "has 0 pictures; give 1 to"),
    "a scale": ({"image_prompts": [sent(scale=11)]}, "an image prompt's scale is 11"),
    "an end": ({"image_prompts": [sent(start=0.5, end=0.2)]}, "must not end before"),
    "broken": (
        {"image_prompts": [{**sent(), "picture": BROKEN}]},
        "image_prompts cannot be read",
    ),
    "a URL": (
        {"image_prompts": [{**sent(), "picture": "https://example.org/a.png"}]},
        "image_prompts is a URL",
    ),
    "a black mask": (
        {"image_prompts": [sent(mask=base64_of(Image.new("L", (8, 8))))]},
        "mask is black everywhere",
    ),
    "a field": ({"image_prompts": [{**sent(), "path": "/a"}]}, "is no field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_sentence(client, name):
    fields, sentence = REFUSED[name]
    assert sentence in refusal(client, {"prompt": "a fox", **FIELDS, **fields})


@pytest.fixture
def api(running):
    opened = FreshScripts(baseurl=f"{running.url}/sdapi/v1", steps=4)
    yield opened
    opened.session.close()


ASKED = {"prompt": "a fox", "seed": 5, "cfg_scale": 5, **SIZE}
ASKED |= {"sampler_name": "Euler a", "scheduler": "karras"}
TOLD = {"seed": 5, "noise": "cuda", "sampler": "euler_a", "schedule": "karras"}


def unit(**fields):
    given = {"image": PICTURE, "model": "linear", "module": "ip-adapter_clip_sd15", **fields}
    return webuiapi.ControlNetUnit(**given)


def test_webuiapis_units(api, draw):
    two = [unit(weight=0.7, guidance_end=0.5), unit(model="plus [1234abcd]", image=OTHER)]
    answer = api.txt2img(controlnet_units=two, **ASKED)
    given = [
        ImagePrompt(adapter="linear", image=PICTURE, scale=0.7, end=0.5),
        ImagePrompt(adapter="plus", image=OTHER),
    ]
    assert same(answer.image, draw(image_prompts=given, **TOLD))
    plain = api.txt2img(**ASKED)
    assert same(plain.image, draw(**TOLD))
    for off in (unit(enabled=False), unit(model="None")):
        assert same(api.txt2img(controlnet_units=[off], **ASKED).image, plain.image)
    answer = api.img2img(images=[OTHER], controlnet_units=[unit(image=None)], **ASKED)
    over = {"image": OTHER, "strength": 0.75, **TOLD}
    seen = ImagePrompt(adapter="linear", image=OTHER)
    assert same(answer.image, draw(image_prompts=[seen], **over))


def answered(client, *args):
    body = {**ASKED, "steps": 4, "alwayson_scripts": {"controlnet": {"args": list(args)}}}
    return client.post("/sdapi/v1/txt2img", json=body)


def image_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))


def test_other_writings_of_units(client, draw):
    several = [{"image": base64_of(PICTURE)}, {"image": base64_of(OTHER), "mask": None}]
    mask = {"effective_region_mask": base64_of(LEFT)}
    for module in ("ip-adapter-auto", "CLIP-ViT-H (IPAdapter)", "none", None):
        given = {"model": "plus", "module": module, "image": several, **mask}
        both = ImagePrompt(adapter="plus", image=[PICTURE, OTHER], mask=LEFT)
        assert same(image_of(answered(client, given)), draw(image_prompts=[both], **TOLD))


NOT_DONE = {
    "a face": ({"module": "ip-adapter_face_id_plus"}, "'ip-adapter_face_id_plus' beside an IP-A"),
    "a net's module": ({"module": "canny"}, "has the module 'canny' beside an IP-Adapter"),
    "none such": ({"model": "style"}, "there is no IP-Adapter 'style'"),
    "layers": ({"advanced_weighting": [1.0] * 16}, "has advanced_weighting"),
    "a pickle": ({"ipadapter_input": ["gASV"]}, "has ipadapter_input; send the picture itself"),
    "a mask": ({"mask": base64_of(LEFT)}, "has a mask beside an IP-Adapter"),
    "no picture": ({"image": ""}, "a unit without its image"),
    "high alone": ({"hr_option": "High res only"}, "both runs are steered"),
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_a_unit_cannot_have_is_one_sentence(client, name):
    fields, sentence = NOT_DONE[name]
    answer = answered(client, {**unit().to_dict(), **fields})
    assert answer.status_code in (400, 404)
    assert sentence in answer.json()["error"]["message"]


def test_lists(api, client):
    assert api.controlnet_model_list() == ["linear", "plus", "xl"]
    assert "ip-adapter_clip_sd15" in api.controlnet_module_list()
    types = client.get("/controlnet/control_types").json()["control_types"]
    assert types["IP-Adapter"]["model_list"] == ["None", "linear", "plus", "xl"]
    assert "ip-adapter-auto" in types["IP-Adapter"]["module_list"]
    said = client.get("/api/v1/capabilities").json()
    assert said["ip_adapters"] == ["linear", "plus", "xl"]
    assert said["limits"]["image_prompts"] == 8
    assert client.get("/sdapi/v1/scripts").json()["txt2img"] == ["controlnet"]


def test_requests_cross_to_the_engines_process_whole():
    data = bytes_of(PICTURE)
    request = PictureRequest(
        fields={"prompt": "a"},
        model="small",
        image=data,
        image_prompts=(
            ImagePromptRequest(adapter="a", pictures=(data, data + b"2"), mask=data + b"m"),
            ImagePromptRequest(adapter="b", pictures=(data + b"b",), scale=[0.5, 1.0], end=0.5),
        ),
    )
    order = to_order(*of_order(Order(job="1", picture_request=request)))
    assert order.picture_request == request


def test_the_operators_ip_adapters(made, tmp_path, capsys):
    _, folder, *_ = made
    adapters, encoders = find_ip_adapters([folder], [])
    assert set(adapters) == set(encoders) == {"linear", "plus", "xl"}
    said = capsys.readouterr().err
    assert "face.safetensors is left out" in said
    assert "FaceID" in said
    other = tmp_path / "wide"
    small_encoder(projection_dim=48).save_pretrained(other)
    _, encoders = find_ip_adapters([folder], [other])
    beside = str((folder / "image_encoder").resolve())
    assert encoders["linear"] == beside, "the first one that gives what it reads"
    assert encoders["plus"] == str(other.resolve()), "whose tokens are as wide"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "linear.safetensors").symlink_to(folder / "linear.safetensors")
    (alone / "plus.safetensors").write_bytes((folder / "plus.safetensors").read_bytes())
    assert find_ip_adapters([alone], []) == ({}, {})
    said = capsys.readouterr().err
    assert "linear.safetensors is left out (it lies elsewhere)" in said
    assert "no image encoder gives the width 64 that it reads; name one with --image-enc" in said
    with pytest.raises(RequestError, match=r"--image-encoder: .* holds no config\.json"):
        find_ip_adapters([folder], [tmp_path])
    with pytest.raises(RequestError, match="is no folder"):
        find_ip_adapters([tmp_path / "none"], [])


def test_the_engine_is_told_of_them(made):
    _, folder, *_ = made
    parse = make_parser("serve").parse_args
    settings = engine_settings(parse(["--ip-adapter-dir", str(folder)]))
    assert set(settings.ip_adapters) == {"linear", "plus", "xl"}
    assert settings.files[settings.ip_adapters["plus"]]
    assert settings.files[settings.image_encoders["plus"]]
    again = EngineSettings.from_json(settings.as_json())
    told = runner(again)
    assert told.ip_adapters["plus"] == Path(settings.ip_adapters["plus"])
    assert told.image_encoders["plus"] == (folder / "image_encoder").resolve()
    with pytest.raises(RequestError, match="tensorrt runs no IP-Adapters yet"):
        engine_settings(parse(["--ip-adapter-dir", str(folder), "--backend", "tensorrt"]))
