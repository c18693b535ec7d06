"""Controls and regions in a server, against the pipeline's own pictures, bit for bit."""

import base64
import io
from functools import partial

import httpx
import pytest
import webuiapi
from PIL import Image

from engine.errors import RequestError
from runtime import Control, Pipeline, Region
from serving.engine_settings import EngineSettings
from serving.frames import of_order, to_order
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.model_memory import weight_bytes
from serving.model_runner import Models
from serving.operator_files import find_controls
from serving.options import engine_settings, make_parser
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.steering import ControlRequest, RegionRequest
from tests.support import clients
from tests.support.clients import FreshScripts, base64_of, bytes_of, refusal
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.pictures import same
from tests.support.servers import serving
from tests.support.small_models import SMALL
from tests.support.small_pictures import (
    DEPRECATIONS,
    HINT,
    LEFT,
    PIXELS,
    SETTINGS,
    TURNED,
    write_small,
)
from tests.support.t2i_adapters import small_t2i_adapter, write_t2i_adapter

pytestmark = DEPRECATIONS
SIZE = {"height": PIXELS, "width": PIXELS}
FIELDS = {"num_inference_steps": 4, "guidance_scale": 5.0, "sampler": "ddim", **SIZE}


@pytest.fixture(scope="module")
def made(place):
    """Write a small model, its ControlNets "a" and "b", its T2I-Adapter "t2i", and two of XL."""
    small, file, graphs = write_small("sd1", place)
    nets = {
        name: write_control_net(small_control_net(small, seed), place / "nets" / name)
        for seed, name in enumerate("ab")
    }
    path = place / "nets" / "t2i.safetensors"
    nets["t2i"] = write_t2i_adapter(small_t2i_adapter((64, 128)), path, "original")
    load = partial(Pipeline.load, graphs=graphs, settings=SETTINGS)
    pipeline = load(file, controls=nets)
    trace_control_graphs(pipeline, graphs)
    nets["xl"] = write_control_net(small_control_net(SMALL["xl"]), place / "nets" / "xl")
    wide = small_t2i_adapter((64, 128), kind="full_adapter_xl")
    nets["t2i-xl"] = write_t2i_adapter(wide, place / "nets" / "t2i-xl")
    return file, nets, load, pipeline


@pytest.fixture
def models(made):
    file, nets, load, _ = made
    return Models(models={"small": file}, loras={}, controls=nets, load=load, limits=Limits())


@pytest.fixture(scope="module")
def running(made):
    file, nets, load, _ = made
    runner = Models(models={"small": file}, loras={}, controls=nets, load=load, limits=Limits())
    catalog = Catalog(models=("small",), loras=(), controls=tuple(nets))
    with serving(runner, catalog=catalog) as started:
        yield started


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=60) as opened:
        yield opened


@pytest.fixture
def draw(made):
    *_, pipeline = made
    return lambda prompt="a fox", **fields: pipeline(prompt, **{**FIELDS, **fields}).images[0]


def control(name="a", picture=HINT, **fields):
    return {"name": name, "picture": base64_of(picture), **fields}


def submitted(client, **fields):
    return clients.submitted(client, prompt="a fox", **{**FIELDS, **fields})


def fetched(client, job):
    file, said = clients.fetched(client, job)
    return Image.open(io.BytesIO(file)), said


def test_rows_of_none_one_and_two_controls_are_what_they_are_alone(client, draw):
    a, b = Control(net="a", image=HINT, weight=0.8), Control(net="b", image=TURNED, end=0.5)
    late = Control(net="a", image=TURNED, weight=(0.2, 1.0), start=0.5, mode="control")
    first, second = control(weight=0.8), control("b", TURNED, end=0.5)
    third = control(picture=TURNED, weight=[0.2, 1.0], start=0.5, mode="control")
    asked = [((), ()), ((first,), (a,)), ((first, second), (a, b)), ((third,), (late,))]
    jobs = [submitted(client, seed=seed, controls=sent) for seed, (sent, _) in enumerate(asked)]
    for seed, (job, (_, given)) in enumerate(zip(jobs, asked, strict=True)):
        picture, said = fetched(client, job)
        assert same(picture, draw(seed=seed, controls=given))
        assert said["settings"].get("controls", []) == [each.text for each in given]
    assert not same(picture, draw(seed=seed))


def test_rows_with_and_without_t2i_adapters_are_what_they_are_alone(client, draw):
    adapter, net = Control(net="t2i", image=HINT, weight=0.8), Control(net="a", image=TURNED)
    late = Control(net="t2i", image=TURNED, weight=(0.2, 1.0), start=0.5, mode="control")
    first, second = control("t2i", weight=0.8), control(picture=TURNED)
    third = control("t2i", TURNED, weight=[0.2, 1.0], start=0.5, mode="control")
    asked = [((), ()), ((first,), (adapter,)), ((second,), (net,))]
    asked += [((second, first), (net, adapter)), ((third,), (late,))]
    jobs = [submitted(client, seed=6, controls=sent) for sent, _ in asked]
    pictures = []
    for job, (_, given) in zip(jobs, asked, strict=True):
        picture, said = fetched(client, job)
        assert same(picture, draw(seed=6, controls=given))
        assert said["settings"].get("controls", []) == [each.text for each in given]
        pictures.append(picture.tobytes())
    assert len(set(pictures)) == len(asked), "each of them steers"


def test_a_preprocessor_and_a_picture_over_what_is_painted(client, draw):
    sent = control(preprocessor="canny:low=20,high=60")
    picture, said = fetched(client, submitted(client, seed=1, controls=[sent]))
    given = Control(net="a", image=HINT, preprocessor="canny:low=20,high=60")
    assert same(picture, draw(seed=1, controls=[given]))
    assert not same(picture, draw(seed=1, controls=[Control(net="a", image=HINT)]))
    assert said["settings"]["control_preprocessors"] == ["canny:low=20,high=60"]
    painted = {"seed": 1, "strength": 0.7}
    job = submitted(client, controls=[sent], image=base64_of(TURNED), **painted)
    assert same(fetched(client, job)[0], draw(controls=[given], image=TURNED, **painted))


def test_regions(client, draw):
    sent = [{"prompt": "a red apple", "mask": base64_of(LEFT), "weight": 0.5}]
    picture, _ = fetched(client, submitted(client, seed=2, regions=sent))
    given = [Region(prompt="a red apple", mask=LEFT, weight=0.5)]
    assert same(picture, draw(seed=2, regions=given))
    assert not same(picture, draw(seed=2))


def test_openais_images_take_them_too(client, draw):
    body = {"prompt": "a fox", "seed": 4, **FIELDS, "controls": [control()]}
    answer = client.post("/v1/images/generations", json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert same(picture, draw(seed=4, controls=[Control(net="a", image=HINT)]))


BROKEN = base64.b64encode(b"\x89PNG no picture").decode()
REFUSED = {
    "another family": ({"controls": [control("xl")]}, "xl does not fit the model small"),
    "an adapter of another": ({"controls": [control("t2i-xl")]}, "t2i-xl does not fit the model"),
    "no such net": ({"controls": [control("../a")]}, "there is no control '../a'"),
    "five": ({"controls": [control()] * 5}, "controls has 5 pictures that steer; up to 4"),
    "a weight": ({"controls": [control(weight=11)]}, "a control's weight is 11"),
    "an end": ({"controls": [control(start=0.5, end=0.2)]}, "must not end before"),
    "a mode": ({"controls": [control(mode="loud")]}, "a control's mode"),
    "a file": (
        {"controls": [control(preprocessor="/etc/x.onnx")]},
        "there is no preprocessor '/etc/x.onnx'; choose one of canny",
    ),
    "an option": ({"controls": [control(preprocessor="gray:low=1")]}, "it has none"),
    "no picture": ({"controls": [{**control(), "picture": BROKEN}]}, "controls cannot be read"),
    "a URL": (
        {"controls": [{**control(), "picture": "https://example.org/a.png"}]},
        "controls is a URL",
    ),
    "no mask": ({"regions": [{"prompt": "a", "mask": BROKEN}]}, "regions cannot be read"),
    "black": ({"regions": [{"prompt": "a", "mask": base64_of(Image.new("L", (8, 8)))}]}, "black"),
    "many": ({"regions": [{"prompt": "a", "mask": base64_of(LEFT)}] * 5}, "regions has 5"),
    "a field": ({"controls": [{**control(), "path": "/a"}]}, "is no field"),
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
    return webuiapi.ControlNetUnit(**{"image": HINT, "model": "a", "module": "none", **fields})


def test_webuiapis_units(api, draw):
    plain = api.txt2img(**ASKED)
    two = [unit(weight=0.7, guidance_end=0.5), unit(model="b [1234abcd]", control_mode=2)]
    answer = api.txt2img(controlnet_units=two, **ASKED)
    given = [
        Control(net="a", image=HINT, weight=0.7, end=0.5),
        Control(net="b", image=HINT, mode="control"),
    ]
    assert same(answer.image, draw(controls=given, **TOLD))
    assert same(plain.image, draw(**TOLD))
    assert len(answer.images) == 1
    for off in (unit(enabled=False), unit(model="None")):
        assert same(api.txt2img(controlnet_units=[off], **ASKED).image, plain.image)
    answer = api.txt2img(controlnet_units=[unit(model="t2i", weight=0.7)], **ASKED)
    given = Control(net="t2i", image=HINT, weight=0.7)
    assert same(answer.image, draw(controls=[given], **TOLD))
    edges = unit(module="canny", threshold_a=20, threshold_b=999)
    given = Control(net="a", image=HINT, preprocessor="canny:low=20,high=200")
    answer = api.txt2img(controlnet_units=[edges], **ASKED)
    assert same(answer.image, draw(controls=[given], **TOLD))
    answer = api.img2img(images=[TURNED], controlnet_units=[unit(image=None)], **ASKED)
    over = {"image": TURNED, "strength": 0.75, **TOLD}
    assert same(answer.image, draw(controls=[Control(net="a", image=TURNED)], **over))


def test_a_unit_that_fills_sees_the_masked_part_as_a_hole(api, draw):
    hole = HINT.convert("RGBA")
    hole.putalpha(Image.eval(LEFT, lambda value: 255 - value))
    filled = api.txt2img(controlnet_units=[unit(module="inpaint_only", mask=LEFT)], **ASKED)
    holed = api.txt2img(controlnet_units=[unit(image=hole)], **ASKED)
    assert same(filled.image, holed.image.convert("RGB"))
    assert not same(filled.image, api.txt2img(controlnet_units=[unit()], **ASKED).image)


NOT_DONE = {
    "a module": (unit(module="openpose_full"), "'openpose_full'; choose one of none, canny"),
    "no picture": (unit(image=None), "a unit without its image"),
    "no mask": (unit(module="inpaint_only"), "without a mask"),
    "another shape": (unit(image=HINT.resize((64, 32))), "neither cut nor filled up"),
    "a mode": (unit(resize_mode="Folded"), "'Folded'; choose one of Just Resize"),
    "high alone": (unit(hr_option="High res only"), "both runs are steered"),
    "how": (unit(control_mode=7), "control_mode '7'"),
    "no such net": (unit(model="depth"), "there is no control 'depth'"),
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_a_unit_cannot_have_is_one_sentence(client, name):
    given, sentence = NOT_DONE[name]
    body = {**ASKED, "steps": 4, "alwayson_scripts": {"ControlNet": {"args": [given.to_dict()]}}}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code in (400, 404)
    assert sentence in answer.json()["error"]["message"]


def test_other_writings_of_units(client):
    def answer(*args):
        body = {**ASKED, "steps": 1, "alwayson_scripts": {"controlnet": {"args": list(args)}}}
        return client.post("/sdapi/v1/txt2img", json=body)

    plain = answer({"input_image": base64_of(HINT), "model": "a"}).json()["images"]
    pair = {"image": base64_of(HINT), "mask": None}
    for image in (pair, [base64_of(HINT), None], f"data:image/png;base64,{pair['image']}"):
        assert answer(None, {"image": image, "model": "a"}).json()["images"] == plain
    for wrong in ("a unit", {"image": 7, "model": "a"}, {"weight": "much", "model": "a"}):
        assert answer(wrong).status_code == 400
    assert answer({"image": pair, "model": "a"}).json()["parameters"]["alwayson_scripts"] == {}
    given = {"alwayson_scripts": {"ADetailer": {"args": []}}}
    said = client.post("/sdapi/v1/txt2img", json={**ASKED, **given}).json()["error"]
    assert "'ADetailer'; ControlNet is the only script" in said["message"]


def test_lists(api, client):
    names = ["a", "b", "t2i", "xl", "t2i-xl"]
    assert api.controlnet_model_list() == names
    assert {"none", "canny", "inpaint_only"} <= set(api.controlnet_module_list())
    assert api.controlnet_version() == 3
    said = client.get("/api/v1/capabilities").json()
    assert said["controls"] == names
    assert "canny" in said["preprocessors"]
    assert client.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    assert client.get("/sdapi/v1/scripts").json()["txt2img"] == ["controlnet"]


def begun(models, *nets):
    data = bytes_of(HINT)
    request = PictureRequest(
        fields={"prompt": "a", "seed": 1, **FIELDS},
        model="small",
        controls=[ControlRequest(net=net, picture=data) for net in nets],
    )
    (picture,) = models.unfinished_pictures(request)
    return picture


def test_nets_count_among_the_bytes_and_are_let_go_of(models):
    plain = begun(models)
    pipeline = plain.pipeline
    alone = weight_bytes(pipeline)
    one = begun(models, "a")
    with_one = weight_bytes(pipeline)
    assert one.pipeline is pipeline, "a control changes no weight"
    assert with_one > alone
    one.enter()
    plain.enter()
    assert one.fitting_rows() < plain.fitting_rows()
    assert one.form != plain.form
    models.budget = with_one
    both = begun(models, "b")
    assert both.pipeline is not pipeline, "what no longer fits beside it is loaded without"
    assert both.pipeline.control_nets.names == ("b",)
    models.step([one])  # and pictures on their way keep theirs
    models.budget = None
    adapted = begun(models, "t2i")
    adapted.enter()
    bare = begun(models)
    bare.enter()
    assert adapted.pipeline is bare.pipeline
    assert weight_bytes(adapted.pipeline) > with_one
    assert adapted.bucket != bare.bucket, "its step takes features"
    assert adapted.fitting_rows() > 0
    models.step([adapted])
    assert begun(models, "a", "b").pipeline is both.pipeline
    with pytest.raises(RequestError, match="xl does not fit the model small"):
        begun(models, "xl")
    assert begun(models, "a").pipeline is both.pipeline


def test_requests_cross_to_the_engines_process_whole():
    data = bytes_of(HINT)
    request = PictureRequest(
        fields={"prompt": "a"},
        model="small",
        image=data,
        controls=(
            ControlRequest(net="a", picture=data, weight=[0.5, 1.0], preprocessor="canny"),
            ControlRequest(net="b", picture=data + b"b", mask=data, mode="prompt"),
        ),
        regions=(RegionRequest(prompt="a cat", mask=data + b"m", weight=0.5),),
    )
    order = to_order(*of_order(Order(job="1", picture_request=request)))
    assert order.picture_request == request


def test_the_operators_nets(place, made, tmp_path, capsys):
    file, nets, *_ = made
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(b"")
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "depth.safetensors").write_bytes(b"")
    (folder / "pose.pth").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "b d.safetensors").write_bytes(b"")
    found = find_controls([f"depth={nets['a']}"], folder)
    assert found == {"depth": str(nets["a"].resolve()), "pose": str(folder / "pose.pth")}
    said = capsys.readouterr().err
    assert "link.safetensors is left out (it lies elsewhere)" in said
    assert "b d.safetensors is left out (requests cannot name it)" in said
    assert set(find_controls([], nets["a"].parent)) == set(nets)
    for given, sentence in (
        (["a.safetensors"], "has no name"),
        (["a=/nowhere"], "does not exist"),
        ([f"a={file}", f"a={file}"], "two ControlNets are called a"),
    ):
        with pytest.raises(RequestError, match=sentence):
            find_controls(given, None)
    parse = make_parser("serve").parse_args
    settings = engine_settings(parse(["--control", f"a={nets['a']}"]))
    assert settings.files[settings.controls["a"]]
    assert EngineSettings.from_json(settings.as_json()).controls == settings.controls
    with pytest.raises(RequestError, match="tensorrt runs no ControlNets yet"):
        engine_settings(parse(["--control", f"a={nets['a']}", "--backend", "tensorrt"]))
