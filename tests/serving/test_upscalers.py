"""Upscalers in a server: by name in hires fix, and pictures enlarged, beside `Upscaler` itself."""

import base64
import io
from pathlib import Path

import httpx
import pytest
import webuiapi
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.errors import RequestError
from runtime import Hires
from runtime.images.files import (
    SOURCE_KEY,
    encode_image,
    read_settings,
    settings_in,
    source_type_in,
)
from runtime.images.upscaler import Upscaler
from serving.child import runner
from serving.engine_settings import EngineSettings
from serving.enlarging_picture import EnlargingPicture
from serving.enlarging_request import EnlargingRequest
from serving.errors import BadRequestError, TooLargeError, UnavailableError
from serving.frames import of_order, to_order
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.loop import Loop
from serving.model_files import list_files
from serving.model_memory import upscaler_bytes, weight_bytes
from serving.model_runner import Models
from serving.operator_files import find_upscalers
from serving.options import engine_settings, make_parser
from serving.order import Order
from serving.picture_request import PictureRequest
from tests.support.clients import base64_of, bytes_of, fetched, finished, submitted
from tests.support.pictures import drawing, same
from tests.support.servers import load, serving
from tests.support.upscaler_files import ESRGAN, write_upscaler

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZE = {"height": 32, "width": 32}
FIELDS = {"num_inference_steps": 2, "sampler": "ddim", **SIZE}
PICTURE = drawing(40, 28)
DOUBLED = 2 * PICTURE.width, 2 * PICTURE.height
NAMES = ("RealESRGAN_x4plus", "up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("upscalers")
    write_upscaler(place / "up.safetensors")
    write_upscaler(place / "RealESRGAN_x4plus.safetensors", ESRGAN, seed=1)
    return place


def models_of(folder, **more):
    return Models(
        models={"pictogram": "pictogram"},
        loras={},
        upscalers={name: Path(path) for name, path in find_upscalers(folder).items()},
        threads=1,
        load=load,
        limits=Limits(),
        **more,
    )


@pytest.fixture(scope="module")
def running(folder):
    catalog = Catalog(models=("pictogram",), loras=(), upscalers=NAMES)
    with serving(models_of(folder), catalog=catalog) as started:
        yield started


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=60) as opened:
        yield opened


@pytest.fixture
def api(running):
    opened = webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", steps=2)
    yield opened
    opened.session.close()


HIRES = {"scale": 2.0, "strength": 0.5, "num_inference_steps": 2}


def test_hires_fix_by_the_operators_upscaler(client, folder):
    body = {"prompt": "a fox", "seed": 7, **FIELDS}
    jobs = [
        submitted(client, "pictures", **{**body, "hires": {**HIRES, "upscaler": name}})
        for name in ("up", "lanczos")
    ]
    (data, said), (plain, _) = (fetched(client, job) for job in jobs)
    file = str(folder / "up.safetensors")
    with load("pictogram") as pipeline:
        drawn = pipeline("a fox", seed=7, hires=Hires(upscaler=file, **HIRES), **FIELDS).images[0]
    assert same(Image.open(io.BytesIO(data)), drawn)
    assert data != plain
    assert said["settings"]["hires"]["upscaler"] == "up"
    assert str(folder) not in str(said)


def test_hires_fix_of_automatic1111_and_openai(api, client):
    asked = {"prompt": "a fox", "seed": 7, "enable_hr": True, "denoising_strength": 0.5, **SIZE}
    asked |= {"sampler_name": "Euler", "hr_scale": 2, "hr_second_pass_steps": 2}
    by_name = api.txt2img(hr_upscaler="RealESRGAN_x4plus", **asked)
    assert by_name.image.size == (64, 64)
    assert "Hires upscaler: RealESRGAN_x4plus" in by_name.info["infotexts"][0]
    assert same(by_name.image, api.txt2img(hr_upscaler="R-ESRGAN 4x+", **asked).image)
    assert not same(by_name.image, api.txt2img(hr_upscaler="Lanczos", **asked).image)
    body = {"prompt": "a fox", "seed": 7, **FIELDS, "hires": {**HIRES, "upscaler": "up"}}
    answer = client.post("/v1/images/generations", json=body).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    job = submitted(client, "pictures", **body)
    assert same(picture, Image.open(io.BytesIO(fetched(client, job)[0])))


def test_lists(api, client):
    names = [each["name"] for each in api.get_upscalers()]
    assert names == ["None", "Lanczos", *NAMES]
    said = client.get("/api/v1/capabilities").json()["upscalers"]
    assert said[0] == "lanczos"
    assert said[-2:] == list(NAMES)


@pytest.mark.parametrize("factor", [None, 1.5, 3])
def test_a_picture_is_enlarged(client, folder, factor):
    body = {"image": base64_of(PICTURE), "upscaler": "up", "factor": factor}
    data, said = fetched(client, submitted(client, "upscales", **body))
    expected = Upscaler.load(folder / "up.safetensors")(PICTURE, factor)
    assert same(Image.open(io.BytesIO(data)), expected)
    assert (said["step"], said["seed"]) == (said["total"], None)
    assert said["total"] >= 1
    assert source_type_in(data) == "algorithmicallyEnhanced"
    assert said["settings"]["upscale"] == "up"


def test_lanczos_needs_no_network(client):
    body = {"image": base64_of(PICTURE), "upscaler": "lanczos", "factor": 2, "format": "webp"}
    data, said = fetched(client, submitted(client, "upscales", **body))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("WEBP", DOUBLED)
    assert said["total"] == 0


def test_what_a_picture_was_made_with_stays_in_its_file(client):
    drawn, _ = fetched(client, submitted(client, prompt="a fox", seed=3, **FIELDS))
    body = {"image": base64.b64encode(drawn).decode(), "upscaler": "up", "factor": 2}
    first, _ = fetched(client, submitted(client, "upscales", **body))
    made, kept = settings_in(drawn), settings_in(first)
    assert kept == {**made, "upscale": "up:2"}
    assert source_type_in(first) == "trainedAlgorithmicMedia"
    body |= {"image": base64.b64encode(first).decode(), "factor": 1.5}
    second, _ = fetched(client, submitted(client, "upscales", **body))
    assert settings_in(second) == {**kept, "left_out": {"upscale": "up:1.5"}}


BAD_TEXTS = {
    "no JSON": "{",
    "a list": "[1]",
    "deep": "[" * 100_000,
    "numbers": '{"prompt": 7, "sampler": {"a": []}, "width": "wide", "hashes": 3}',
    "halves of characters": '{"prompt": "\\ud800", "sampler": "euler"}',
    "zeros": '{"prompt": "a\\u0000b", "sampler": "euler", "left_out": []}',
    "long": '{"prompt": "' + "a" * 900_000 + '"}',
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_strangers_settings_keep_nobody_from_enlarging(client, text, kind):
    chunk = PngInfo()
    chunk.add_itxt("latentrt", text)
    body = {"image": base64_of(PICTURE, pnginfo=chunk), "upscaler": "up", "format": kind}
    data, _ = fetched(client, submitted(client, "upscales", **body))
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == DOUBLED
    assert len(data) < 100_000


def test_tiles_are_steps_and_are_told(client):
    body = {"image": base64_of(drawing(1100, 40)), "upscaler": "up"}
    job = submitted(client, "upscales", **body)
    assert fetched(client, job)[1]["total"] == 3
    events = client.get(f"/api/v1/pictures/{job}/events").text
    assert events.count("event: step") == 3


REFUSED = {
    "none": ({"upscaler": "../up"}, "there is no upscaler '../up'"),
    "latents": ({"upscaler": "bicubic"}, "there is no upscaler 'bicubic'"),
    "smaller": ({"factor": 0.5}, "factor is 0.5; give 1 to 16"),
    "huge": ({"image": base64_of(drawing(2000, 2000)), "factor": 3}, "have 6000 x 6000 pixels"),
    "no picture": ({"image": base64.b64encode(b"\x89PNG no").decode()}, "image cannot be read"),
    "a URL": ({"image": "https://example.org/a.png"}, "image is a URL"),
    "a field": ({"path": "/a"}, "is no field"),
    "a format": ({"format": "gif"}, "format is 'gif'"),
    "not a number": ({"factor": "much"}, "factor is not what it must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enlarged_is_one_sentence(client, name):
    fields, sentence = REFUSED[name]
    body = {"image": base64_of(PICTURE), "upscaler": "up", **fields}
    answer = client.post("/api/v1/upscales", json=body)
    assert answer.status_code in (400, 404, 413)
    assert sentence in answer.json()["error"]["message"]


def test_a_picture_that_its_upscaler_would_make_too_large(client):
    body = {"image": base64_of(Image.new("RGB", (2100, 2100))), "upscaler": "up"}
    said = finished(client, submitted(client, "upscales", **body))
    assert "would have 4200 x 4200 pixels" in said["error"]["message"]


def test_hires_fix_by_what_is_not_there(client):
    body = {"prompt": "a", **FIELDS, "hires": {"upscaler": "/etc/passwd"}}
    answer = client.post("/api/v1/pictures", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "hires")
    assert "there is no upscaler '/etc/passwd'" in answer.json()["error"]["message"]


def test_extras_of_webuiapi(api, folder):
    upscaler = Upscaler.load(folder / "up.safetensors")
    answer = api.extra_single_image(PICTURE, upscaler_1="up", upscaling_resize=1.5)
    assert same(answer.image, upscaler(PICTURE, 1.5))
    size = {"resize_mode": 1, "upscaling_resize_w": 60, "upscaling_resize_h": 60}
    answer = api.extra_single_image(PICTURE, upscaler_1="up", **size)
    covering = upscaler(PICTURE, 60 / 28)
    assert answer.image.size == (60, 60)
    top = (covering.height - 60) // 2
    assert same(answer.image, covering.crop((0, top, 60, top + 60)))
    answer = api.extra_single_image(PICTURE, upscaler_1="up", upscaling_crop=False, **size)
    assert same(answer.image, covering)
    small = {"resize_mode": 1, "upscaling_resize_w": 20, "upscaling_resize_h": 14}
    assert api.extra_single_image(PICTURE, upscaler_1="up", **small).image.size == (20, 14)
    assert same(api.extra_single_image(PICTURE).image, PICTURE)
    answer = api.extra_single_image(PICTURE, upscaler_1="Lanczos")
    assert same(answer.image, PICTURE.convert("RGB").resize(DOUBLED, Image.Resampling.LANCZOS))
    answer = api.extra_batch_images([PICTURE, PICTURE.transpose(0)], upscaler_1="up")
    assert [image.size for image in answer.images] == [DOUBLED, DOUBLED]
    assert same(answer.images[1], upscaler(PICTURE.transpose(0), 2))


NOT_DONE = {
    "no such": ({"upscaler_1": "LDSR"}, "upscaler_1 is 'LDSR'; choose one of None, Lanczos, Real"),
    "two": ({"upscaler_2": "up", "extras_upscaler_2_visibility": 0.5}, "one upscaler enlarges"),
    "faces": ({"gfpgan_visibility": 1}, "no model here restores faces"),
    "others": ({"codeformer_visibility": 0.5}, "no model here restores faces"),
    "a mode": ({"resize_mode": 3}, "resize_mode is 3; give 0 to 1"),
    "a factor": ({"upscaling_resize": 17}, "factor is 17; give 1 to 16"),
    "a side": ({"resize_mode": 1, "upscaling_resize_w": 0}, "upscaling_resize_w is 0"),
    "a long side": ({"resize_mode": 1, "upscaling_resize_w": 9000}, "times larger; up to 16"),
    "no picture": ({"image": ""}, "image cannot be read"),
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_extras_cannot_do_is_one_sentence(client, name):
    fields, sentence = NOT_DONE[name]
    body = {"image": base64_of(PICTURE), "upscaler_1": "up", **fields}
    answer = client.post("/sdapi/v1/extra-single-image", json=body)
    assert answer.status_code in (400, 404, 413), answer.text
    assert sentence in answer.json()["error"]["message"]


def test_no_picture_at_all_and_too_many(client):
    one = {"data": base64_of(PICTURE), "name": "a"}
    for count in (0, 11):
        answer = client.post("/sdapi/v1/extra-batch-images", json={"imageList": [one] * count})
        assert f"imageList is {count}; give 1 to 10" in answer.json()["error"]["message"]


def test_a_cancelled_picture_leaves_between_two_tiles(folder):
    models, told = models_of(folder), []
    loop = Loop(models, told.append)
    data = bytes_of(drawing(1100, 40))
    loop.submit(Order(job="1", picture_request=EnlargingRequest(image=data, upscaler="up")))
    assert loop.prepare()
    assert loop.step()
    loop.cancel("1")
    assert not loop.step()
    assert not loop.finish()
    assert [event.kind for event in told] == ["taken", "started", "turn"]


def test_tiles_and_steps_take_turns(folder):
    """A picture that is enlarged keeps nobody from being drawn meanwhile."""
    models, told = models_of(folder), []
    loop = Loop(models, told.append)
    data = bytes_of(drawing(1100, 40))
    fields = {"prompt": "a fox", "seed": [1], **FIELDS}
    loop.submit(Order(job="1", picture_request=EnlargingRequest(image=data, upscaler="up")))
    loop.submit(Order(job="2", picture_request=PictureRequest(fields=fields, model="pictogram")))
    while loop.prepare():
        pass
    while loop.step():
        pass
    while loop.finish():
        pass
    assert {event.job for event in told if event.kind == "finished"} == {"1", "2"}


def test_upscalers_are_shared_counted_and_let_go_of(folder):
    models = models_of(folder)
    hires = {**HIRES, "upscaler": "lanczos"}

    def draw(name):
        fields = {"prompt": "a", "seed": [1], **FIELDS, "hires": hires}
        request = PictureRequest(fields=fields, model="pictogram", hires_upscaler=name)
        return models.unfinished_pictures(request)[0]

    first = draw("up")
    (opened,) = models._open_upscalers.values()
    held = weight_bytes(first.pipeline) + upscaler_bytes(opened)
    assert models._held == held
    data = bytes_of(PICTURE)
    enlarging = models.unfinished_pictures(EnlargingRequest(image=data, upscaler="up"))[0]
    assert isinstance(enlarging, EnlargingPicture)
    assert list(models._open_upscalers.values()) == [opened], "nothing is opened twice"
    models.budget = held
    draw("RealESRGAN_x4plus")
    assert [Path(path).stem for path in models._open_upscalers] == ["RealESRGAN_x4plus"]
    first.enter()
    while not first.is_done:
        if first.run_is_over:
            first.enter()
        models.step([first])
    assert first.finish().data, "a picture on its way opens what it needs again"


def test_another_file_in_the_place_of_an_upscaler_is_refused(tmp_path):
    path = write_upscaler(tmp_path / "up.safetensors")
    models = models_of(tmp_path, files={str(path.resolve()): list_files(path)})
    path.unlink()
    write_upscaler(tmp_path / "other", seed=1).rename(path)
    with pytest.raises(UnavailableError, match="up is another file now"):
        models.unfinished_pictures(EnlargingRequest(image=bytes_of(PICTURE), upscaler="up"))


def test_requests_cross_to_the_engines_process_whole():
    request = EnlargingRequest(
        image=bytes_of(PICTURE), upscaler="up", size=[60, 40], crop=False, format="WEBP", quality=7
    )
    order = to_order(*of_order(Order(job="1", picture_request=request)))
    assert order.picture_request == request
    assert order.indices == [0]
    drawn = PictureRequest(fields={"prompt": "a"}, model="m", hires_upscaler="up")
    assert to_order(*of_order(Order(job="2", picture_request=drawn))).picture_request == drawn


def test_work_grows_with_the_picture_and_is_bounded():
    def asked(side, **more):
        return EnlargingRequest(image=bytes_of(Image.new("L", (side, side))), upscaler="up", **more)

    small, large = asked(512).work, asked(1024).work
    assert 0 < small < large == pytest.approx(4 * small)
    assert asked(512, factor=8).work > 10 * small
    with pytest.raises(TooLargeError, match="up to 16777216 in all are made"):
        asked(1025, factor=4).checked(Limits())
    with pytest.raises(TooLargeError, match="steps of 512 x 512 pixels' work; up to 10 are taken"):
        asked(1024).checked(Limits(work=10))
    with pytest.raises(BadRequestError, match="a side is less than 1"):
        asked(8, size=[0, 8]).checked(Limits())


def test_the_operators_upscalers(folder, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    write_upscaler(tmp_path / "lanczos.safetensors")
    write_upscaler(tmp_path / "b d.safetensors")
    write_upscaler(tmp_path / "good.safetensors")
    (tmp_path / "link.safetensors").symlink_to(folder / "up.safetensors")
    assert find_upscalers(tmp_path) == {"good": str((tmp_path / "good.safetensors").resolve())}
    said = capsys.readouterr().err
    for name in ("text.pth", "lanczos.safetensors", "b d.safetensors", "link.safetensors"):
        assert f"{name} is left out (" in said
    assert find_upscalers(None) == {}
    settings = engine_settings(make_parser("serve").parse_args(["--upscaler-dir", str(folder)]))
    assert tuple(settings.upscalers) == NAMES
    assert settings.files[settings.upscalers["up"]]
    again = EngineSettings.from_json(settings.as_json())
    assert again.upscalers == settings.upscalers
    assert runner(again).upscalers == {name: folder / f"{name}.safetensors" for name in NAMES}
    with pytest.raises(RequestError, match="is no folder"):
        find_upscalers(tmp_path / "none")


def test_a_files_settings_are_read_from_its_bytes_as_from_its_path(tmp_path):
    PICTURE.info[SOURCE_KEY] = "algorithmicallyEnhanced"
    data = encode_image(PICTURE, "PNG", {"prompt": "a"})
    (tmp_path / "a.png").write_bytes(data)
    assert settings_in(data) == read_settings(tmp_path / "a.png") == {"prompt": "a"}
    with pytest.raises(RequestError, match="it cannot be read as a picture"):
        settings_in(b"no picture")
