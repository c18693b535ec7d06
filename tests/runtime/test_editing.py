"""Models that edit a picture by an instruction, beside diffusers' InstructPix2Pix."""

import numpy as np
import pytest
import torch

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from engine.model import Model
from runtime import Hires, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support.pictures import drawing, psnr
from tests.support.small_models import SMALL, trace_graphs
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SETTINGS = BackendSettings(threads=1, backend="cpu")
PROMPT, SEED, IMAGE = "make it winter", 3, drawing(64, 64)
FIELDS = {"negative_prompt": "blurry", "num_inference_steps": 4, "guidance_scale": 6.0}


@pytest.fixture(scope="module")
def pipeline(place):
    file = SMALL["editing"].write_file(place)
    trace_graphs(Model.open(file), place)
    trace_graphs(Model.open(file), place, ["step_shallow"])
    return Pipeline.load(file, graphs=place, settings=SETTINGS)


def draw(pipeline, **fields):
    given = {"seed": SEED, "sampler": "ddim", "image": IMAGE, **FIELDS, **fields}
    return pipeline(PROMPT, **given).images[0]


def theirs(**fields):
    reference = SMALL["editing"].reference
    reference.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    return reference(PROMPT, image=IMAGE, generator=generator, **{**FIELDS, **fields}).images[0]


def test_pictures_are_diffusers_own(pipeline):
    for fields in ({}, {"image_guidance_scale": 2.5}, {"guidance_scale": 1.0}):
        picture = theirs(**{"image_guidance_scale": 1.5, **fields})
        assert psnr(draw(pipeline, **fields), picture) >= SMALL_PICTURE_PSNR_DB
    other = drawing(64, 64).transpose(0)
    assert psnr(draw(pipeline, image=other), theirs(image_guidance_scale=1.5)) < 40
    assert psnr(draw(pipeline, image_guidance_scale=3.0), theirs(image_guidance_scale=1.5)) < 70


def test_a_folder_of_it_is_read_too(pipeline, place):
    folder = place / "folder"
    SMALL["editing"].reference.save_pretrained(folder)
    model = Model.open(folder)
    assert model.is_editing
    assert not model.is_inpainting
    assert model.unet == pipeline.model.unet
    other = Pipeline.load(folder, graphs=place, settings=SETTINGS)
    assert psnr(draw(other), draw(pipeline)) >= SMALL_PICTURE_PSNR_DB


def test_rows_and_pictures_are_what_they_are_alone(pipeline):
    unlike = (
        {},
        {"image_guidance_scale": 3.0, "sampler": "euler"},
        {"image": IMAGE.transpose(1), "guidance_scale": 2.0},
        {"pag_scale": 2.0},
        {"cache_interval": 2},
        {"guidance_interval": (0.0, 0.5)},
    )
    requests = [
        Request(**{"prompt": PROMPT, "seed": i, "sampler": "ddim", "image": IMAGE, **FIELDS, **f})
        for i, f in enumerate(unlike)
    ]
    together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=4)}
    for i, fields in enumerate(unlike):
        assert np.array_equal(together[i], draw(pipeline, seed=i, **fields)), fields
    images = pipeline(
        PROMPT, image=IMAGE, seed=SEED, sampler="ddim", num_images_per_prompt=2, **FIELDS
    ).images
    assert np.array_equal(images[0], draw(pipeline))


def test_pictures_of_other_sizes(pipeline):
    image = drawing(70, 90)
    assert draw(pipeline, image=image).size == image.size
    assert draw(pipeline, image=image, height=64, width=64).size == (64, 64)
    assert draw(pipeline, seamless="x").size == (64, 64)


def test_groups_and_their_weights(pipeline):
    calls = pipeline.plan(
        Request(prompt=PROMPT, image=IMAGE, image_guidance_scale=1.5, **FIELDS)
    ).conditioning
    (weights,) = {tuple(call["guidance"].ravel().tolist()) for call in calls}
    assert np.allclose(weights, [-0.5, 1.5 - 6.0, 6.0])
    assert calls[0]["shown"].ravel().tolist() == [0, 1, 1]
    assert np.array_equal(calls[0]["context"][0], calls[0]["context"][1])


def test_what_cannot_be_is_one_sentence(pipeline):
    with pytest.raises(
        RequestError, match="as the prompt tells it, and came without image; give the picture"
    ):
        pipeline(PROMPT)
    mask = IMAGE.convert("L")
    for name, value in {
        "strength": 0.5,
        "mask": mask,
        "extend": (0, 0, 8, 0),
        "image_noise": "gaussian:0.1",
        "hires": Hires(),
        "apg": (0.0, 1.0, 0.0),
    }.items():
        with pytest.raises(RequestError, match=f"from noise, and {name} came; leave it out"):
            draw(pipeline, **{name: value})
    with pytest.raises(RequestError, match=r"edits, .* and CFG\+\+ knows two"):
        draw(pipeline, sampler="euler_cfg_pp")
    with pytest.raises(RequestError, match=r"image_guidance_scale is 0\.5; give a number from 1"):
        draw(pipeline, image_guidance_scale=0.5)
    with pytest.raises(RequestError, match="image_guidance_scale came without image"):
        Request(prompt=PROMPT, image_guidance_scale=2.0)
    plain = Pipeline.load(settings=SETTINGS)
    with pytest.raises(RequestError, match="image_guidance_scale is for models that edit"):
        draw(plain, image_guidance_scale=2.0)
    before = pipeline.engines.settings
    pipeline.engines.settings = BackendSettings(backend="tensorrt")
    try:
        with pytest.raises(RequestError, match="the backend tensorrt runs no models that edit"):
            pipeline.plan(Request(prompt=PROMPT, image=IMAGE))
    finally:
        pipeline.engines.settings = before


def test_the_command_line_and_the_same_picture_again(pipeline, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    IMAGE.save(tmp_path / "photo.png")
    first, again = tmp_path / "one.png", tmp_path / "again.png"
    shared = ["--graphs", str(place), "--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--model", str(pipeline.model_path), "--steps", "2", "--seed", "1"]
    asked += ["--image", str(tmp_path / "photo.png"), "--image-guidance-scale", "2"]
    assert main([*asked, *shared, "--out", str(first)]) == 0
    settings = read_settings(first)
    assert settings["image_guidance_scale"] == 2.0
    assert settings["image"] == "photo.png"
    assert main(["--again", str(first), *shared, "--out", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
