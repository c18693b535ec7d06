"""An image prompt by itself: its scales, masks and pixels, how it is written, what it refuses."""

import numpy as np
import pytest
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine.configs.diffusion import UNetConfig
from engine.errors import RequestError
from runtime.image_prompt import (
    ImagePrompt,
    attention_maps,
    checked_image_prompts,
    parse_image_prompt,
    with_image_prompts,
)
from runtime.image_prompt_options import image_prompts_of, ip_adapter_arguments
from runtime.images.clip_pixels import clip_pixels
from runtime.options import make_parser
from tests.support import published_configs as published
from tests.support.pictures import drawing

IMAGE = Image.new("RGB", (16, 8), (255, 0, 51))
LEFT = Image.fromarray(np.uint8(255 * (np.indices((64, 96))[1] < 40)))


def prompt(**fields):
    return ImagePrompt(**{"image": IMAGE, **fields})


class Model:
    """What masks are made for: the levels of SD 1.5, cells of 8 pixels."""

    unet = UNetConfig.from_dict(published.UNET_SD15)
    vae = type("Vae", (), {"compression": 8})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
@pytest.mark.parametrize("size", [(224, 224), (640, 427), (100, 333), (31, 30), (24, 60)])
def test_pixels_are_transformers_own(size, mode):
    image = drawing(*size[::-1]).convert(mode)
    expected = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"]
    found = clip_pixels(image, 224)
    assert found.dtype == np.float32
    assert found.shape == (1, 3, 224, 224)
    assert np.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (768, 512)])
def test_masks_are_diffusers_own(size):
    mask = LEFT.rotate(20)
    shown = IPAdapterMaskProcessor().preprocess(mask, height=size[0], width=size[1])
    found = attention_maps([prompt(mask=mask), prompt()], Model, None, size)
    assert [*found] == [f"ip_weights_{level}" for level in range(4)]
    for level, places in enumerate(found.values()):
        sides = tuple(side // 8 >> level for side in size)
        assert places.shape == (2, *sides)
        expected = IPAdapterMaskProcessor.downsample(shown[0], 1, sides[0] * sides[1], 1)
        assert np.allclose(places[0].ravel(), expected.numpy().ravel(), rtol=0, atol=1e-5)
        assert np.array_equal(places[1], np.ones(sides))


def test_how_much_pictures_count_in_each_group():
    calls = [{"context": np.zeros((groups, 2, 5, 4))} for groups in (3, 3, 1, 1)]
    maps = {"ip_weights_0": np.stack([np.ones((2, 2)), np.full((2, 2), 0.5)])}
    given = with_image_prompts(calls, [prompt(scale=0.8), prompt(end=0.5)], 1, maps)
    weights = [call["ip_weights_0"] for call in given]
    assert [array.shape for array in weights] == [(3, 2, 4, 2, 2)] * 2 + [(1, 2, 4, 2, 2)] * 2
    first = weights[0][:, 0, :, 0, 0]
    nothing = [0, 0, 0.8, 0.5]  # what stands for no picture, in groups that are moved away from
    assert np.allclose(first, [nothing, nothing, [0.8, 0.5, 0, 0]])
    assert np.allclose(weights[2][:, 1, :, 1, 1], [[0.8, 0, 0, 0]])
    assert weights[0] is weights[1], "equal calls share an array"
    (unguided, *_) = with_image_prompts(calls[2:], [prompt(), prompt()], 1, maps)
    assert unguided["ip_weights_0"].shape[2] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fox.png", ("fox.png", (1.0,), 0.0, 1.0)),
        ("a/fox.png:0.8", ("a/fox.png", (0.8,), 0.0, 1.0)),
        (r"C:\p\fox.png:.5@0.2:0.8", (r"C:\p\fox.png", (0.5,), 0.2, 0.8)),
        ("fox:1,0.5@0:0.5", ("fox", (1.0, 0.5), 0.0, 0.5)),
        ("fox 1:2.png", ("fox 1:2.png", (1.0,), 0.0, 1.0)),
    ],
)
def test_how_it_is_written(text, expected):
    assert parse_image_prompt(text) == expected
    name, scales, start, end = expected
    written = prompt(adapter=name, scale=scales, start=start, end=end).text
    assert parse_image_prompt(written) == expected


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_texts_that_name_no_picture(text):
    with pytest.raises(RequestError, match="names no picture; give PICTURE or"):
        parse_image_prompt(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": ""}, "an image prompt's adapter is ''; give an IP-Adapter's name"),
        ({"image": "fox.png"}, "an image prompt's image came as str"),
        ({"image": []}, "an image prompt has 0 pictures; give 1 to 16"),
        ({"image": [IMAGE] * 17}, "an image prompt has 17 pictures"),
        ({"image": [IMAGE, 3]}, "an image prompt's image came as int"),
        ({"scale": -1}, "an image prompt's scale is -1; give a number from 0 to 10"),
        ({"scale": (1.0, float("nan"))}, "an image prompt's scale is nan"),
        ({"scale": "1"}, "an image prompt's scale is '1'"),
        ({"start": 2}, "an image prompt's start is 2; give a number from 0 to 1"),
        ({"start": 0.5, "end": 0.2}, "an image prompt starts at 0.5 and ends at 0.2"),
        ({"mask": "left.png"}, "an image prompt's mask came as str"),
        ({"mask": Image.new("L", (4, 4))}, "mask is black everywhere; make white"),
    ],
)
def test_what_it_refuses(fields, message):
    with pytest.raises(RequestError, match=message):
        prompt(**fields)


@pytest.mark.parametrize("prompts", ["fox.png", 3, [IMAGE], [prompt()] * 17])
def test_what_are_no_image_prompts(prompts):
    with pytest.raises(RequestError, match=r"^image_prompts "):
        checked_image_prompts(prompts)
    assert len(checked_image_prompts(prompt())) == 1


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "b.png", "left.png", "faces/2.png", "faces/1.png"):
        (LEFT if name == "left.png" else IMAGE).save(tmp_path / name)
    return tmp_path


def options(*words):
    return make_parser("draw").parse_args(["a fox", *words])


def test_options_make_image_prompts(files):
    words = ["--image-prompt", "a.png:0.5@0:0.5", "--image-prompt", "faces"]
    chosen = options(*words, "--ip-adapter", "plus.bin")
    first, second = image_prompts_of(chosen)
    assert (first.adapter, first.scales, first.end) == ("plus.bin", (0.5,), 0.5)
    assert (len(first.images), len(second.images)) == (1, 2)
    assert ip_adapter_arguments(chosen)["image_encoder"] is None
    more = ["--ip-adapter", "a.bin", "--ip-adapter", "b.bin", "--image-encoder", "clip"]
    masks = ["--image-prompt-mask", "left.png", "--image-prompt-mask", "none"]
    chosen = options(*words, *more, *masks)
    first, second = image_prompts_of(chosen)
    assert [first.adapter, second.adapter] == ["a.bin", "b.bin"]
    assert first.mask is not None
    assert second.mask is None
    assert {*map(str, ip_adapter_arguments(chosen)["image_encoder"].values())} == {"clip"}
    assert image_prompts_of(options()) == []
    assert ip_adapter_arguments(options()) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ip-adapter", "a.bin"], "--ip-adapter came without --image-prompt; give the picture"),
        (["--image-encoder", "a"], "--image-encoder came without --image-prompt"),
        (["--image-prompt", "a.png"], "--image-prompt came without --ip-adapter; give its file"),
        (
            ["--image-prompt", "a.png", *["--ip-adapter", "a.bin"] * 2],
            "--ip-adapter came 2 times for 1 of --image-prompt; give one for all, or one for each",
        ),
        (
            ["--ip-adapter=a", *["--image-prompt", "a.png"] * 3, *["--image-prompt-mask", "x"] * 2],
            "--image-prompt-mask came 2 times for 3",
        ),
        (["--image-prompt", "empty", "--ip-adapter", "a.bin"], "empty holds no picture; give PNG"),
        (["--image-prompt", "no.png", "--ip-adapter", "a.bin"], "no.png cannot be read"),
    ],
)
def test_options_that_do_not_belong_together(files, words, message):
    with pytest.raises(RequestError, match=message):
        image_prompts_of(options(*words))


def test_image_encoders_belong_to_adapters(files):
    words = [*["--ip-adapter", "a.bin"] * 3, *["--image-encoder", "clip"] * 2]
    with pytest.raises(RequestError, match="--image-encoder came 2 times for 3 of --ip-adapter"):
        ip_adapter_arguments(options(*words))
