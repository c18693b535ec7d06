"""Requests of Automatic1111's API: those of Open WebUI and SillyTavern, and what is refused."""

import base64
import io
import json
import re
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from runtime.samplers import SCHEDULES
from serving.http.automatic1111.drawing import (
    NOT_DONE,
    NOT_DONE_IN_HIRES,
    image_request,
    text_request,
)
from serving.http.automatic1111.fields import ImageBody, TextBody
from serving.http.automatic1111.names import SCHEDULERS, list_samplers, method
from serving.http.automatic1111.settings import Settings
from serving.limits import Limits
from serving.masking import fill_masked, invert_mask
from tests.support.servers import CATALOG, SlowStudio, serving

SETTINGS = Settings(sd_model_checkpoint="pictogram")
API = "/sdapi/v1"
# What Open WebUI 0.12 and SillyTavern 1.12 send for a picture, field by field.
OPEN_WEBUI = {
    "prompt": "a cat", "batch_size": 2, "width": 512, "height": 512, "steps": 50,
    "negative_prompt": "blurry",
}  # fmt: skip
SILLY_TAVERN = {
    "url": "http://127.0.0.1:7860", "auth": "me:SECRET", "prompt": "a cat",
    "negative_prompt": "blurry", "sampler_name": "Euler a", "scheduler": "karras", "steps": 20,
    "cfg_scale": 7, "width": 512, "height": 512, "restore_faces": False, "enable_hr": False,
    "hr_upscaler": "Latent", "hr_scale": 1.0, "denoising_strength": 0.7,
    "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True,
    "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def running():
    with serving(SlowStudio(0), limits=Limits(body_bytes=2**20)) as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


PICTURE = encoded(Image.new("RGB", (64, 32), "red"))


def test_open_webuis_sequence(http):
    """Verify, list, choose a model with all options sent back, and draw."""
    options = http.get(f"{API}/options").raise_for_status().json()
    listed = http.get(f"{API}/sd-models").raise_for_status().json()
    assert [(model["title"], model["model_name"]) for model in listed] == [
        ("pictogram", "pictogram"),
        ("other", "other"),
    ]
    assert options["sd_model_checkpoint"] == "pictogram"
    options["sd_model_checkpoint"] = "other"
    http.post(f"{API}/options", json=options).raise_for_status()
    assert http.get(f"{API}/options").json()["sd_model_checkpoint"] == "other"
    answer = http.post(f"{API}/txt2img", json=OPEN_WEBUI).raise_for_status().json()
    assert len(answer["images"]) == 2
    assert all(base64.b64decode(image) for image in answer["images"])
    assert isinstance(answer["info"], str)
    http.post(f"{API}/options", json={"sd_model_checkpoint": "pictogram"}).raise_for_status()


def test_silly_taverns_sequence(http):
    """Ping, every list, a model, the wait for it, a picture, and the interruption at the end."""
    assert http.get(f"{API}/options").status_code == 200
    upscalers = [each["name"] for each in http.get(f"{API}/upscalers").json()]
    upscalers[1:1] = [each["name"] for each in http.get(f"{API}/latent-upscale-modes").json()]
    assert upscalers[:2] == ["None", "Latent"]
    assert http.get(f"{API}/sd-vae").json() == []
    assert "Euler a" in [each["name"] for each in http.get(f"{API}/samplers").json()]
    assert "karras" in [each["name"] for each in http.get(f"{API}/schedulers").json()]
    title = http.get(f"{API}/sd-models").json()[0]["title"]
    http.post(f"{API}/options", json={"sd_model_checkpoint": title}).raise_for_status()
    told = http.get(f"{API}/progress").json()
    assert (told["progress"], told["state"]["job_count"]) == (0.0, 0)
    answer = http.post(f"{API}/txt2img", json=SILLY_TAVERN).raise_for_status()
    assert base64.b64decode(answer.json()["images"][0])
    assert "SECRET" not in answer.text, "what is no field does not come back"
    for upscaler in upscalers:
        body = {**SILLY_TAVERN, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": upscaler}
        assert http.post(f"{API}/txt2img", json=body).status_code == 200
    assert http.post(f"{API}/interrupt").status_code == 200, "without a body or its type"


def test_a_body_that_is_there_needs_its_type(http):
    for path in ("interrupt", "options"):
        for content in (b"{}", b" " * 70_000):
            assert http.post(f"{API}/{path}", content=content).status_code == 415
        chunks = iter([b"{", b"}"])
        assert http.post(f"{API}/{path}", content=chunks).status_code == 415
    foreign = {"origin": "https://elsewhere.example"}
    assert http.post(f"{API}/interrupt", headers=foreign).status_code == 403
    assert http.post("/api/v1/pictures").status_code == 415


@pytest.mark.parametrize(
    ("name", "scheduler", "wanted"),
    [
        (None, None, (None, None)),
        (None, "karras", ("euler", "karras")),
        ("Euler a", "automatic", ("euler_a", "normal")),
        ("Euler a", "Uniform", ("euler_a", "normal")),
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Uniform", ("dpmpp_2m", "normal")),
        ("DPM++ 2M Karras", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE", None, ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M", "kl_optimal", ("dpmpp_2m", "a1111_kl_optimal")),
        ("DPM++ 2M", "Align Your Steps", ("dpmpp_2m", "a1111_align_your_steps")),
        ("Euler", "SGMUniform", ("euler", "sgm_uniform")),
        ("Euler", "polyexponential", ("euler", "exponential")),
        ("Euler", "ddim", ("euler", "leading")),
        ("DDIM", "karras", ("ddim", None)),
        ("LCM", "Automatic", ("lcm", None)),
    ],
)
def test_names_of_samplers_and_schedulers(name, scheduler, wanted):
    assert method(name, scheduler) == wanted


def test_every_listed_name_can_be_asked_for():
    for sampler in list_samplers():
        given = {"sampler_name": sampler["name"], "seed": 1}
        fields = text_request(TextBody(**given), SETTINGS, Limits(), CATALOG).fields
        assert fields["sampler"] == sampler["aliases"][0]
    for name, label in SCHEDULERS.items():
        for given in (name, label):
            sampler, schedule = method("Euler", given)
            assert sampler == "euler"
            assert schedule in SCHEDULES


def test_tiling_joins_all_edges():
    for given, seamless in ((True, "both"), (False, None), (None, None)):
        fields = text_request(
            TextBody(prompt="a", tiling=given), SETTINGS, Limits(), CATALOG
        ).fields
        assert fields.get("seamless") == seamless


def test_what_is_left_out_is_chosen_by_the_model():
    fields = text_request(TextBody(prompt=None), SETTINGS, Limits(), CATALOG).fields
    assert {name: value for name, value in fields.items() if name != "seed"} == {
        "prompt": "", "num_images_per_prompt": 1, "noise": "cuda", "clip_skip": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"restore_faces": True}, "restore_faces"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"alwayson_scripts": {"ADetailer": {"args": []}}}, "alwayson_scripts"),
        ({"s_churn": 0.5}, "s_churn"),
        ({"s_noise": 1.1}, "s_noise"),
        ({"seed_resize_from_w": 512}, "seed_resize_from_w"),
        ({"refiner_checkpoint": "xl"}, "refiner_checkpoint"),
        ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name"),
        ({"scheduler": "Nonsense"}, "scheduler"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_iter": 11}, "n_iter"),
        ({"batch_size": 4, "n_iter": 4}, "batch_size"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"subseed": -2, "subseed_strength": 1}, "subseed"),
        ({"subseed_strength": 2}, "subseed_strength"),
        ({"seed": -2}, "seed"),
        ({"steps": 151}, "steps"),
        ({"steps": 0}, "steps"),
        ({"width": 4096, "height": 64}, "width"),
        ({"cfg_scale": "much"}, "cfg_scale"),
        ({"override_settings": {"sd_vae": "vae-ft-mse"}}, "sd_vae"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 3}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"randn_source": "dice"}}, "randn_source"),
        ({"override_settings": {"samples_format": "avif"}}, "samples_format"),
        ({"override_settings": {"jpeg_quality": 101}}, "jpeg_quality"),
        ({"override_settings": {"sd_model_checkpoint": "../x"}}, "sd_model_checkpoint"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler"),
        ({"enable_hr": True, "hr_sampler_name": "DDIM"}, "hr_sampler_name"),
        ({"enable_hr": True, "hr_prompt": "a dog"}, "hr_prompt"),
        ({"enable_hr": True, "firstphase_width": 64}, "firstphase_width"),
        ({"enable_hr": True, "hr_resize_x": 512}, "hr_resize_x"),
        ({"enable_hr": True, "hr_resize_x": 512, "hr_resize_y": 256, "width": 256, "height": 256},
         "hr_resize_x"),
        ({"enable_hr": True, "hr_scale": 9}, "hr_scale"),
        ({"enable_hr": True, "denoising_strength": 2}, "denoising_strength"),
        ({"enable_hr": True, "hr_scale": 4, "width": 1024, "height": 1024}, "height"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(http, given, param):
    answer = http.post(f"{API}/txt2img", json={"prompt": "p", **given})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    if error["code"] != "not_supported" and param not in ("sd_vae", "sd_model_checkpoint"):
        assert param in error["message"]
    assert error["message"].count("\n") == 0


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"init_images": None}, 404, "init_images is missing"),
        ({"init_images": []}, 404, "init_images is missing"),
        ({"init_images": [PICTURE, encoded(Image.new("RGB", (8, 8)))]}, 400, "several pictures"),
        ({"init_images": ["http://127.0.0.1/x.png"]}, 400, "nothing is fetched"),
        ({"init_images": ["/etc/passwd"]}, 400, "not base64"),
        ({"init_images": ["%%"]}, 400, "not base64"),
        ({"mask": "file:///etc/passwd"}, 400, "nothing is fetched"),
        ({"mask": PICTURE, "inpainting_fill": 2}, 400, "inpainting_fill is 2"),
        ({"mask": PICTURE, "mask_blur_x": 1, "mask_blur_y": 2}, 400, "differ"),
        ({"mask": PICTURE, "mask_round": False}, 400, "half-tones"),
        ({"latent_mask": PICTURE}, 400, "send mask instead"),
        ({"resize_mode": 3}, 400, "resize_mode is 3"),
        ({"resize_mode": 1, "width": 64, "height": 64}, 400, "neither cut nor padded"),
        ({"initial_noise_multiplier": 0.5}, 400, "not scaled"),
        ({"denoising_strength": 2}, 400, "denoising_strength is 2"),
    ],
)
def test_what_cannot_be_done_with_a_picture(http, given, status, words):
    answer = http.post(f"{API}/img2img", json={"init_images": [PICTURE], "prompt": "p", **given})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_bombs_in_base64(http):
    """A picture of a thousand million pixels, texts that unfold, and a file that breaks off."""
    head = base64.b64decode(PICTURE)
    size = (40_000).to_bytes(4, "big") * 2 + head[24:29]
    crc = zlib.crc32(b"IHDR" + size).to_bytes(4, "big")
    huge = base64.b64encode(head[:16] + size + crc + head[33:]).decode()
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", "a" * 80_000_000, zip=True)
    texts = encoded(Image.new("RGB", (8, 8)), pnginfo=chunk)
    for picture, status in ((huge, 413), (texts, 400), ("AAAA", 400)):
        for path, body in (
            ("png-info", {"image": picture}),
            ("img2img", {"init_images": [picture]}),
            ("img2img", {"init_images": [PICTURE], "mask": picture}),
        ):
            answer = http.post(f"{API}/{path}", json=body)
            assert answer.status_code == status, (path, answer.text)


def test_what_a_file_says(http):
    text = "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 7, Size: 512x768"
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", text)
    chunk.add_text("Software", "NovelAI")
    answer = http.post(
        f"{API}/png-info", json={"image": encoded(Image.new("RGB", (8, 8)), pnginfo=chunk)}
    ).json()
    assert answer == {
        "info": text,
        "items": {"Software": "NovelAI"},
        "parameters": {
            "Prompt": "a cat", "Negative prompt": "blurry", "Steps": "20", "Sampler": "Euler a",
            "Seed": "7", "Size-1": "512", "Size-2": "768",
        },
    }  # fmt: skip
    nothing = {"info": "", "items": {}, "parameters": {}}
    for image in ("", encoded(Image.new("RGB", (8, 8))), f"data:image/png;base64,{PICTURE}"):
        assert http.post(f"{API}/png-info", json={"image": image}).json() == nothing


def test_images_are_not_sent_where_nobody_wants_them(http):
    body = {"prompt": "p", "steps": 1, "send_images": False, "seed": 4}
    answer = http.post(f"{API}/txt2img", json=body).json()
    assert answer["images"] == []
    assert '"all_seeds": [4]' in answer["info"]
    body = {"init_images": [PICTURE], "include_init_images": True, "steps": 2}
    answer = http.post(f"{API}/img2img", json=body).json()
    assert answer["parameters"]["init_images"] == [PICTURE]


def test_fields_of_image_to_image():
    given = {"init_images": [f"data:image/png;base64,{PICTURE}"], "mask": PICTURE}
    request = image_request(ImageBody(**given), SETTINGS, Limits(), CATALOG)
    assert (request.fill_masked, request.mask_inverted) == (True, False)
    wanted = {"strength": 0.75, "mask_blur": 4.0, "inpaint_area": "masked", "mask_padding": 0}
    assert wanted.items() <= request.fields.items()
    given |= {"inpainting_fill": 1, "inpainting_mask_invert": 1, "inpaint_full_res": False,
              "mask_blur_x": 2, "mask_blur_y": 2, "resize_mode": 1, "width": 128, "height": 64,
              "inpaint_full_res_padding": 32, "denoising_strength": 0.5}  # fmt: skip
    request = image_request(ImageBody(**given), SETTINGS, Limits(), CATALOG)
    assert (request.fill_masked, request.mask_inverted) == (False, True)
    wanted = {"strength": 0.5, "mask_blur": 2.0, "inpaint_area": "whole"}
    assert wanted.items() <= request.fields.items()
    assert "mask_padding" not in request.fields, "it is of the other area"
    assert type(request).unpacked(request.packed()[0], request.packed()[1]) == request


def test_eta_is_of_samplers_that_have_one():
    for name, wanted in (("DDIM", 1.0), ("Euler", None), ("Euler a", None), ("DPM++ 2M", None)):
        request = text_request(TextBody(sampler_name=name, eta=1.0), SETTINGS, Limits(), CATALOG)
        assert request.fields.get("eta") == wanted


def test_size_of_hires_fix():
    given = {"enable_hr": True, "width": 64, "height": 128}
    for more, scale in (({}, 2.0), ({"hr_scale": 1.5}, 1.5), ({"hr_resize_x": 96}, 1.5),
                        ({"hr_resize_y": 384, "hr_resize_x": 192}, 3.0)):  # fmt: skip
        request = text_request(TextBody(**given, **more), SETTINGS, Limits(), CATALOG)
        hires = request.fields["hires"]
        assert hires["scale"] == scale
        assert (hires["strength"], hires["upscaler"]) == (0.75, "bilinear")


def test_what_is_masked_is_filled_from_around():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (200, 0, 0), (0, 0, 200)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 56, 56))
    pixels[8:56, 8:56] = (0, 255, 0)  # what is painted over colours nothing
    filled = np.asarray(fill_masked(Image.fromarray(pixels), mask)).astype(int)
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(filled[kept], pixels[kept])
    inside = filled[8:56, 8:56]
    assert inside[..., 1].max() <= 2
    assert inside[:, 4, 0].mean() > 2 * inside[:, 4, 2].mean(), "red on its left"
    assert inside[:, -4, 2].mean() > 2 * inside[:, -4, 0].mean(), "blue on its right"
    small = invert_mask(mask.resize((32, 32)))
    assert np.asarray(small)[0, 0] == 255
    assert np.asarray(small)[16, 16] == 0
    assert set(np.unique(np.asarray(small))) == {0, 255}


def test_the_page_names_every_route_option_and_refusal(http):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    page = page.partition("## Automatic1111's API")[2].partition("### Open WebUI")[0]
    paths = http.get("/openapi.json").json()["paths"]
    routes = {path.removeprefix(f"{API}/") for path in paths if path.startswith(API)}
    assert len(routes) > 20
    for name in {*routes, *Settings.model_fields, *NOT_DONE, *NOT_DONE_IN_HIRES}:
        assert re.search(rf"[` ]{name}[`:]", page), name


HOSTILE = (
    "NaN",
    "1e400",
    "-1e400",
    str(10**400),
    "[]",
    "{}",
    '"\\ud800"',
    '"\\u0000"',
    "true",
    "-1",
)


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_hostile_values_are_answered(http, kind):
    """Every field with every value, where it acts and where it does not, is drawn or refused."""
    body = {"txt2img": TextBody, "img2img": ImageBody}[kind]
    acting = {
        "prompt": "p",
        "steps": 2,
        "width": 64,
        "height": 64,
        "init_images": [PICTURE],
        "mask": PICTURE,
        "enable_hr": True,
        "subseed_strength": 0.5,
    }
    for given in (acting, {"prompt": "p", "steps": 2, "init_images": [PICTURE]}):
        for name in body.model_fields:
            for value in HOSTILE:
                rest = json.dumps({key: each for key, each in given.items() if key != name})
                text = f'{{"{name}": {value}, {rest[1:]}'
                answer = http.post(
                    f"{API}/{kind}", content=text, headers={"content-type": "application/json"}
                )
                assert answer.status_code in (200, 400, 404, 413), (name, value, answer.text)
                assert len(answer.content) < 100_000


def test_hostile_options(http):
    for name in (*Settings.model_fields, "another"):
        for value in HOSTILE:
            for path, text in (
                ("options", f'{{"{name}": {value}}}'),
                ("txt2img", f'{{"steps": 1, "override_settings": {{"{name}": {value}}}}}'),
            ):
                headers = {"content-type": "application/json"}
                answer = http.post(f"{API}/{path}", content=text, headers=headers)
                assert answer.status_code in (200, 400, 404), (path, name, value, answer.text)
    defaults = Settings(sd_model_checkpoint="pictogram").model_dump()
    http.post(f"{API}/options", json=defaults).raise_for_status()
    assert http.get(f"{API}/options").json() == defaults
