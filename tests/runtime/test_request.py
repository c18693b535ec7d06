import copy
import io
import math
import pickle
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image

from engine.errors import LatentrtError, RequestError
from runtime.checks import FOREIGN_NAMES
from runtime.images.canvas import BLUR
from runtime.images.upscaling import Hires
from runtime.noise import MAX_SEED
from runtime.request import MAX_IMAGES, MAX_SIDE, Request
from runtime.request_options import RequestOptions

ONE = {"prompt": "a"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": None}, "prompt is None; give a text or a list of texts"),
        ({"prompt": 7}, "prompt came as int"),
        ({"prompt": b"a"}, "prompt came as bytes"),
        ({"prompt": {"a", "b"}}, "prompt came as set"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", None]}, "prompt holds a NoneType; every prompt is a text"),
        ({"negative_prompt": 3}, "negative_prompt came as int"),
        ({"negative_prompt": [3]}, "negative_prompt holds a int"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts and prompt has 1"),
        ({"prompt": ["a", "b"], "negative_prompt": []}, "negative_prompt has 0 texts"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; give a number from 0"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": "5"}, "guidance_scale is '5'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; give a whole number from 1"),
        ({"num_images_per_prompt": 1.0}, "num_images_per_prompt is 1.0"),
        ({"num_images_per_prompt": MAX_IMAGES + 1}, f"to {MAX_IMAGES}"),
        ({"num_inference_steps": "20"}, "num_inference_steps is '20'; give a whole number"),
        ({"num_inference_steps": 7.5}, "num_inference_steps is 7.5"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"sampler": ["ddim"]}, r"sampler is \['ddim'\]; give a name"),
        ({"preset": 3}, "preset is 3; give a name, such as 'fast'"),
        ({"guidance_scale": []}, r"guidance_scale is \[\]"),
        ({"guidance_scale": [7, "3"]}, "guidance_scale is '3'"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0 to 1"),
        ({"guidance_interval": (0, 0.5, 1)}, "give two parts of the run"),
        ({"guidance_interval": (0, 2)}, "guidance_interval is 2"),
        ({"guidance_interval": (0.6, 0.5)}, "must not end before it begins"),
        ({"negative_scale": -2}, "negative_scale is -2"),
        ({"noise": "gpu"}, "noise is 'gpu'; did you mean 'cuda'. There are cpu, cuda"),
        ({"seed": [1, 2]}, "seed has 2 numbers for 1 pictures"),
        ({"seed": ["1"]}, "seed is '1'"),
        ({"mask": Image.new("L", (8, 8))}, "mask came without image"),
        ({"extend": (0, 0, 8, 0)}, "extend came without image"),
        ({"mask_blur": -1}, "mask_blur is -1"),
        ({"hires": 2.0}, r"hires is 2.0; give Hires\(scale=2.0\)"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"seed": MAX_SEED + 1}, f"seed is {MAX_SEED + 1}"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is '1'"),
        ({"strength": 1.01}, "strength is 1.01; give a number from 0 to 1"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": math.nan}, "strength is nan"),
        ({"strength": "half"}, "strength is 'half'"),
        ({"eta": 2}, "eta is 2"),
        ({"eta": "0"}, "eta is '0'"),
        ({"image": "apple.png"}, "image came as str; give a PIL image"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image came as ndarray"),
        ({"image": Image.new("RGB", (0, 8))}, "image has 0 x 8 pixels"),
    ],
)
def test_refused(options, said):
    with pytest.raises(RequestError, match=said) as caught:
        Request(**ONE | options)
    assert isinstance(caught.value, LatentrtError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "mask.png"}, "mask came as str"),
        ({"mask": "alpha"}, "nothing of the image is transparent"),
        ({"inpaint_area": "part"}, "inpaint_area is 'part'; choose one of whole, masked"),
        ({"inpaint_area": "masked"}, "inpaint_area came without mask"),
        ({"mask_padding": -1}, "mask_padding is -1"),
        ({"mask": Image.new("L", (0, 8))}, "mask has 0 x 8 pixels"),
        ({"extend": (8, 0)}, "give four numbers of pixels: left, top, right, bottom"),
        ({"extend": 8}, "give four numbers"),
        ({"mask": Image.new("L", (8, 8)), "hires": Hires()}, "enlarge first, then paint anew"),
    ],
)
def test_refused_beside_an_image(options, said):
    with pytest.raises(RequestError, match=said):
        Request(prompt="a", image=Image.new("RGB", (8, 8)), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 0.5}, "hires.scale is 0.5; give a number from 1 to 8"),
        ({"strength": 2}, "hires.strength is 2"),
        ({"num_inference_steps": 2.5}, "hires.num_inference_steps is 2.5"),
        ({"upscaler": "esrgan"}, "hires.upscaler is 'esrgan'; choose one of lanczos"),
    ],
)
def test_refused_of_hires(options, said):
    with pytest.raises(RequestError, match=said):
        Hires(**options)


def test_composed_prompts():
    request = Request(prompt=["a AND b :0.5 AND c:2", "d", r"e \AND f"])
    groups, counts = request.composed()
    assert groups == [["a", "d", r"e \AND f"], ["b", "d", r"e \AND f"], ["c", "d", r"e \AND f"]]
    assert counts.tolist() == [[1, 1, 1], [0.5, 0, 0], [2, 0, 0]]
    groups, counts = Request(prompt="a AND (b)", prompt_syntax=False).composed()
    assert groups == [[r"a \AND \(b\)"]]
    assert counts.tolist() == [[1]]
    with pytest.raises(RequestError, match="joins 20 parts with AND; up to 16"):
        Request(prompt="a" + " AND a" * 19).composed()


def test_an_image_whose_file_ends_early():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    cut = Image.open(io.BytesIO(file.getvalue()[:5000]))
    with pytest.raises(RequestError, match="image cannot be read"):
        Request(prompt="a", image=cut)


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize(
    ("side", "said"),
    [
        (100, "is 100; it must be a multiple of 8, such as 96"),
        (0, f"is 0; give a whole number from 1 to {MAX_SIDE}"),
        (-8, "is -8; give a whole number"),
        (4, "is 4; give a whole number from 8"),
        (9, "is 9; it must be a multiple of 8, such as 8"),
        (True, "is True"),
        (128.0, "is 128.0"),
        ("128", "is '128'"),
        (MAX_SIDE + 8, f"is {MAX_SIDE + 8}"),
    ],
)
def test_refused_sides(name, side, said):
    with pytest.raises(RequestError, match=f"^{name} {said}"):
        Request(prompt="a", **{name: side}).size((128, 128), 8)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (128, 128)),
        ({"height": 64}, (64, 128)),
        ({"width": 64}, (128, 64)),
        ({"height": 8, "width": MAX_SIDE}, (8, MAX_SIDE)),
    ],
)
def test_size(options, size):
    assert Request(prompt="a", **options).size((128, 128), 8) == size


def test_what_is_left_to_the_model():
    request = Request(prompt="a")
    assert (request.num_inference_steps, request.guidance_scale) == (None, None)
    assert (request.height, request.width, request.seed) == (None, None, None)


def test_texts():
    assert Request(prompt="a").prompts == ("a",)
    assert Request(prompt=("a", "b")).negative_prompts == ("", "")
    assert Request(prompt=["a", "b"], negative_prompt="c").negative_prompts == ("c", "c")
    assert Request(prompt=["a", "b"], negative_prompt=["c", ""]).negative_prompts == ("c", "")
    assert Request(prompt="").prompts == ("",), "an empty prompt is one"


def test_seeds_count_up():
    assert Request(prompt="a", seed=0).seeds == (0,)
    assert Request(prompt=["a", "b"], num_images_per_prompt=2, seed=7).seeds == (7, 8, 9, 10)
    assert Request(prompt=["a", "b"], seed=MAX_SEED).seeds == (MAX_SEED, 0)
    assert Request(prompt=["a", "b"], seed=(9, 7)).seeds == (9, 7)
    request = Request(prompt="a", num_images_per_prompt=3)
    assert request.seeds is None
    drawn = request.draw_seeds()
    assert drawn == [drawn[0] + i for i in range(3)]
    assert request.draw_seeds() != drawn
    assert Request(prompt="a", seed=5).draw_seeds() == [5]


def test_none_takes_every_default():
    plain = Request(prompt="a")
    given = {f.name: None for f in fields(Request) if f.init and f.name != "prompt"}
    assert Request(prompt="a", **given) == plain
    assert plain.mask_blur == BLUR
    assert plain.paste_back is True


def test_the_options_of_a_call_are_the_fields():
    init = {f.name for f in fields(Request) if f.init}
    assert {"prompt", *RequestOptions.__annotations__} == init
    assert RequestOptions.__total__ is False


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("steps", "num_inference_steps"),
        ("num_images", "num_images_per_prompt"),
        ("mask_image", "mask"),
        ("generator", "seed"),
        ("cfg_scale", "guidance_scale"),
        ("scheduler", "sampler"),
        ("denoising_strength", "strength"),
        ("guidance_scal", "guidance_scale"),
        ("heigth", "height"),
        ("negative_prompts", "negative_prompt"),
        ("Sampler", "sampler"),
    ],
)
def test_a_foreign_or_misspelt_name_names_the_right_one(name, meant):
    with pytest.raises(RequestError, match=rf"^{name} is no option; did you mean {meant}\?$"):
        Request(prompt="a", **{name: 1})


def test_every_foreign_name_means_a_field():
    names = {f.name for f in fields(Request) if f.init}
    for foreign, meant in FOREIGN_NAMES.items():
        assert foreign not in names
        assert set(meant.split(" and ")) <= names


def test_a_name_like_none_lists_them_all():
    with pytest.raises(RequestError, match="zzz is no option; there are prompt, negative_prompt,"):
        Request(prompt="a", zzz=1)


def test_fields_are_given_by_name():
    with pytest.raises(RequestError, match="by name"):
        Request("a")


def test_a_request_is_copied_and_changed():
    request = Request(prompt=["a", "b"], seed=7, image=Image.new("RGB", (8, 8)))
    assert copy.copy(request).prompts == ("a", "b")
    assert pickle.loads(pickle.dumps(replace(request, image=None))).seeds == (7, 8)
    assert replace(request, seed=1).seeds == (1, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": "512"}, "width is '512'; give a whole number"),
        ({"height": 64.0}, "height is 64.0"),
        ({"sampler": "nope"}, "sampler is 'nope'; choose one of"),
        ({"sampler": "dpmpp-4m"}, "did you mean 'dpmpp_2m'"),
        ({"schedule": "nope"}, "schedule is 'nope'; choose one of"),
        ({"sampler": "DPM++ 2M Karras", "schedule": "beta"}, "give one of them"),
        ({"preset": "best"}, "preset is 'best'; choose one of fast"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; give a whole number from 1"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"paste_back": 1}, "paste_back is 1; give True or False"),
    ],
)
def test_what_needs_no_model_is_checked_when_a_request_is_made(options, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        Request(prompt="a", **options)
