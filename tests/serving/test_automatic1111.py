"""webuiapi, a client of Automatic1111's API, against a server with the model that ships."""

import base64
import hashlib
import json
import threading
import time

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from runtime.images.a1111_reader import parse_parameters
from runtime.images.files import read_settings
from serving.keys import Keys
from tests.support.named_requests import IMAGE, MASK, write_lora
from tests.support.servers import SlowStudio, load, models, serving

STEPS = 4
KEYS = {name: hashlib.sha256(name.encode()).digest() for name in ("anna", "bert")}


@pytest.fixture(scope="module")
def pipeline():
    return load("pictogram")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    lora = write_lora(tmp_path_factory.mktemp("loras"))
    with serving(models(loras={"ink": lora})) as started:
        yield started


@pytest.fixture
def api(running):
    client = webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", steps=STEPS)
    yield client
    client.session.close()


def equal(picture, wanted):
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(wanted))


def test_pictures_are_the_pipelines_bit_for_bit(api, pipeline):
    answer = api.txt2img(
        prompt="a red apple", negative_prompt="blue", seed=7, batch_size=2, n_iter=2, width=128,
        height=128, cfg_scale=6, sampler_name="DPM++ 2M", scheduler="automatic",
    )  # fmt: skip
    wanted = pipeline(
        "a red apple", negative_prompt="blue", seed=7, num_images_per_prompt=4, guidance_scale=6,
        sampler="dpmpp_2m", schedule="karras", noise="cuda", num_inference_steps=STEPS,
    )  # fmt: skip
    assert len(answer.images) == 4
    for picture, image in zip(answer.images, wanted.images, strict=True):
        equal(picture, image)
    info = answer.info
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert info["all_prompts"] == ["a red apple"] * 4
    assert (info["seed"], info["width"], info["height"], info["steps"]) == (7, 128, 128, STEPS)
    assert (info["sampler_name"], info["cfg_scale"], info["batch_size"]) == ("DPM++ 2M", 6, 2)
    assert info["infotexts"][3] == answer.images[3].info["parameters"]
    told = parse_parameters(info["infotexts"][3])
    assert (told["seed"], told["schedule"], told["noise"]) == (10, "karras", "cuda")
    assert answer.parameters["n_iter"] == 2


def test_a_random_seed_is_told_and_draws_the_picture_again(api):
    first = api.txt2img(prompt="a cat", width=128, height=128, seed=-1)
    seed = first.info["seed"]
    assert 0 <= seed < 2**32
    assert api.txt2img(prompt="a cat", width=128, height=128, seed=-1).info["seed"] != seed
    equal(api.txt2img(prompt="a cat", width=128, height=128, seed=seed).image, first.image)


def test_variation_seeds_and_hires_fix(api, pipeline):
    answer = api.txt2img(
        prompt="a cat", seed=1, subseed=5, subseed_strength=0.3, batch_size=2, width=128,
        height=128, sampler_name="Euler", enable_hr=True, hr_scale=1.5, denoising_strength=0.6,
        hr_upscaler=webuiapi.HiResUpscaler.Latent, hr_second_pass_steps=3, cfg_scale=5,
    )  # fmt: skip
    wanted = pipeline(
        "a cat", seed=1, variation_seed=5, variation_strength=0.3, num_images_per_prompt=2,
        sampler="euler", schedule="normal", noise="cuda", num_inference_steps=STEPS,
        guidance_scale=5.0, hires=hires(scale=1.5, num_inference_steps=3, upscaler="bilinear"),
    )  # fmt: skip
    assert answer.image.size == (192, 192)
    for picture, image in zip(answer.images, wanted.images, strict=True):
        equal(picture, image)
    assert answer.info["all_seeds"] == [1, 1]
    assert answer.info["all_subseeds"] == [5, 6]
    assert "Hires upscaler: Latent" in answer.info["infotexts"][0]


def hires(**fields):
    from runtime.images.upscaling import Hires

    return Hires(**fields)


def test_image_to_image_and_its_masks(api, pipeline):
    image, mask = IMAGE.resize((128, 128)), MASK.resize((128, 128))
    given = {"prompt": "a cat", "seed": 2, "width": 128, "height": 128, "cfg_scale": 5}
    same = {"seed": 2, "guidance_scale": 5.0, "sampler": "euler_a", "schedule": "normal",
            "noise": "cuda", "num_inference_steps": STEPS, "strength": 0.75}  # fmt: skip
    plain = api.img2img(images=[image], **given)
    equal(plain.image, pipeline("a cat", image=image, **same).images[0])
    assert plain.parameters["init_images"] is None, "what was sent does not come back"
    inverted = Image.eval(mask.convert("L"), lambda value: 255 - value)
    painted = {"inpaint_full_res": False, "mask_blur": 0, "inpainting_fill": 1}
    one = api.img2img(images=[image], mask_image=mask, **painted, **given)
    wanted = pipeline("a cat", image=image, mask=mask, mask_blur=0, **same).images[0]
    equal(one.image, wanted)
    other = api.img2img(
        images=[image], mask_image=inverted, inpainting_mask_invert=1, **painted, **given
    )
    equal(other.image, wanted)
    filled = api.img2img(
        images=[image], mask_image=mask, **{**painted, "inpainting_fill": 0}, **given
    )
    kept = np.asarray(mask.convert("L")) < 128
    assert not np.array_equal(np.asarray(filled.image), np.asarray(one.image))
    np.testing.assert_array_equal(
        np.asarray(filled.image)[kept], np.asarray(image.convert("RGB"))[kept]
    )
    whole = api.img2img(images=[image], mask_image=mask, inpainting_fill=1, mask_blur=0, **given)
    wanted = pipeline(
        "a cat", image=image, mask=mask, mask_blur=0, inpaint_area="masked", mask_padding=0, **same
    )
    equal(whole.image, wanted.images[0])


def test_prompts_name_adapters_and_override_settings_are_of_one_request(api, pipeline):
    given = {"seed": 3, "width": 128, "height": 128, "sampler_name": "Euler", "cfg_scale": 5}
    same = {"seed": 3, "guidance_scale": 5.0, "sampler": "euler", "schedule": "normal",
            "num_inference_steps": STEPS}  # fmt: skip
    plain = api.txt2img(prompt="a cat", **given)
    inked = api.txt2img(prompt="a cat <lora:ink:1>", **given)
    assert not np.array_equal(np.asarray(plain.image), np.asarray(inked.image))
    assert inked.info["prompt"] == "a cat <lora:ink:1>"
    override = {"CLIP_stop_at_last_layers": 2, "randn_source": "CPU", "samples_format": "webp",
                "a_setting_of_others": 1, "sd_vae": "Automatic"}  # fmt: skip
    other = api.txt2img(prompt="a cat", override_settings=override, **given)
    assert other.image.format == "WEBP"
    assert other.info["clip_skip"] == 2
    assert "Clip skip: 2" in other.info["infotexts"][0]
    assert api.get_options()["CLIP_stop_at_last_layers"] == 1
    third = api.txt2img(prompt="a cat", override_settings={"randn_source": "CPU"}, **given)
    equal(third.image, pipeline("a cat", **same).images[0])


def test_a_file_draws_itself_again(api, tmp_path):
    from runtime.__main__ import main

    answer = api.txt2img(prompt="a cat", seed=3, width=128, height=128, sampler_name="Euler a")
    path, out = tmp_path / "cat.png", tmp_path / "again.png"
    path.write_bytes(base64.b64decode(answer.json["images"][0]))
    assert read_settings(path)["seed"] == 3
    assert main(["--again", str(path), "--threads", "1", "-o", str(out)]) == 0
    equal(answer.image, Image.open(out))
    told = api.png_info(Image.open(path))
    assert told.info == answer.info["infotexts"][0]
    assert told.parameters["Prompt"] == "a cat"
    assert (told.parameters["Seed"], told.parameters["Size-1"]) == ("3", "128")


def test_lists_of_the_client(api):
    assert "Euler a" in [sampler["name"] for sampler in api.get_samplers()]
    assert {"karras", "automatic"} <= {each["name"] for each in api.get_schedulers()}
    assert api.util_get_model_names() == ["other", "pictogram"]
    assert [lora["name"] for lora in api.get_loras()] == ["ink"]
    assert [each["name"] for each in api.get_upscalers()] == ["None", "Lanczos"]
    assert len(api.get_latent_upscale_modes()) == 6
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    for listed in (api.get_sd_vae(), api.get_hypernetworks(), api.get_face_restorers(),
                   api.get_realesrgan_models(), api.get_prompt_styles()):  # fmt: skip
        assert listed == []
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_cmd_flags()["api"] is True
    memory = api.get_memory()["ram"]
    assert 0 < memory["used"] <= memory["total"]
    assert api.refresh_checkpoints() == {}


@pytest.fixture
def slow():
    """Give a server of two keys whose steps take real time, and a client for each key."""
    with serving(SlowStudio(0.02), keys=Keys(hashes=KEYS)) as started:
        address = {"baseurl": f"{started.url}/sdapi/v1", "steps": 100}
        clients = [webuiapi.WebUIApi(username="whoever", password=name, **address) for name in KEYS]
        yield started, *clients
        for client in clients:
            client.session.close()


def begun(api, **given):
    """Begin a drawing in a thread; returns it and where its answer comes."""
    answers = []

    def draw():
        url = f"{api.baseurl}/txt2img"
        body = {"prompt": "p", "steps": 100, **given}
        answers.append(httpx.post(url, json=body, auth=api.session.auth, timeout=60))

    thread = threading.Thread(target=draw)
    thread.start()
    return thread, answers


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def test_interrupting_ends_the_callers_own_drawing_alone(slow):
    _, anna, bert = slow
    mine, answers = begun(anna)
    theirs, kept = begun(bert)
    until(lambda: anna.get_progress()["state"]["sampling_step"] > 1)
    until(lambda: bert.get_progress()["state"]["sampling_step"] > 1)
    assert anna.get_progress()["state"]["job_count"] == 1
    assert anna.interrupt() == {}
    mine.join(10)
    assert answers[0].status_code == 200
    assert answers[0].json()["images"] == []
    assert json.loads(answers[0].json()["info"])["all_seeds"] == []
    assert anna.get_progress()["progress"] == 0
    assert not kept, "the other's is still drawn"
    theirs.join(20)
    assert len(kept[0].json()["images"]) == 1


def test_skipping_ends_one_drawing_and_what_is_finished_stays(slow):
    started, anna, _ = slow
    first, one = begun(anna)
    until(lambda: anna.get_progress()["state"]["sampling_step"] > 0)
    second, two = begun(anna)
    until(lambda: anna.get_progress()["state"]["job_count"] == 2)
    anna.skip()
    first.join(10)
    assert one[0].json()["images"] == []
    (job,) = started.service.jobs.unfinished()
    job.pictures[0].data = b"finished"
    anna.interrupt()
    second.join(10)
    assert two[0].json()["images"] == [base64.b64encode(b"finished").decode()]
    assert len(json.loads(two[0].json()["info"])["all_seeds"]) == 1


def test_progress_shows_steps_and_a_preview(slow):
    _, anna, bert = slow
    thread, answers = begun(anna, batch_size=2)
    seen = []

    def preview():
        seen.append(anna.get_progress())
        return seen[-1]["current_image"]

    until(preview)
    assert base64.b64decode(seen[-1]["current_image"]).startswith(b"\xff\xd8\xff")
    assert seen[-1]["state"]["sampling_steps"] == 100
    assert seen[-1]["state"]["job_count"] == 2
    assert seen[-1]["eta_relative"] > 0
    shares = [each["progress"] for each in seen if each["state"]["job_count"]]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] < 1
    assert bert.get_progress()["state"]["job_count"] == 0, "nobody sees another's"
    assert bert.get_progress()["current_image"] is None
    url = f"{anna.baseurl}/progress?skip_current_image=true"
    assert anna.session.get(url).json()["current_image"] is None
    bert.interrupt()
    assert anna.get_progress()["state"]["job_count"] == 2
    anna.interrupt()
    thread.join(10)
    assert answers[0].status_code == 200


def test_options_are_of_a_key(slow):
    _, anna, bert = slow
    anna.util_set_model("other")
    assert anna.util_get_current_model() == "other"
    assert bert.util_get_current_model() == "pictogram"
    with pytest.raises(RuntimeError, match="model_not_found"):
        anna.txt2img(prompt="p", override_settings={"sd_model_checkpoint": "none"})
    options = {"show_progress_every_n_steps": 0, "sd_model_checkpoint": "none"}
    answer = anna.session.post(f"{anna.baseurl}/options", json=options)
    assert answer.status_code == 404
    assert anna.get_options()["show_progress_every_n_steps"] == 10, "all of it or nothing"
    body = {"prompt": "p", "steps": 1, "override_settings": {"sd_model_checkpoint": "pictogram"}}
    body["override_settings_restore_afterwards"] = False
    assert anna.session.post(f"{anna.baseurl}/txt2img", json=body).status_code == 200
    assert anna.util_get_current_model() == "pictogram"


def test_who_has_no_key_does_nothing(slow):
    started, *_ = slow
    for method, path in (("POST", "txt2img"), ("GET", "options"), ("POST", "interrupt")):
        for auth in (None, ("anna", "wrong")):
            url = f"{started.url}/sdapi/v1/{path}"
            answer = httpx.request(method, url, auth=auth, json={} if method == "POST" else None)
            assert answer.status_code == 401
            assert "Basic" in answer.headers["www-authenticate"]
    headers = {"authorization": "Bearer anna"}
    assert httpx.get(f"{started.url}/sdapi/v1/options", headers=headers).status_code == 200


def test_a_client_that_leaves_frees_its_row(slow):
    started, anna, _ = slow
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{anna.baseurl}/txt2img", json={"prompt": "p", "steps": 150},
            auth=anna.session.auth, timeout=0.3,
        )  # fmt: skip
    until(lambda: not started.service.jobs.unfinished())
