"""A union of ControlNets: pictures against diffusers' own, and the types that it is told."""

from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import RequestError
from runtime import Control, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support import small_pictures
from tests.support.control_unions import PROMAX, small_union, write_union
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.pictures import psnr
from tests.support.small_models import SMALL
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    HINT,
    PIXELS,
    PROMPT,
    SEED,
    SETTINGS,
    TURNED,
    write_small,
)
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS
DEPTH, CANNY, REPAINT = 1, 3, 7  # diffusers' control modes


@pytest.fixture(scope="module")
def loaded(place):
    """Open the small XL model with a union, by two names, and an ordinary ControlNet."""
    small, file, graphs = write_small("xl", place, place)
    net = small_union()
    union = write_union(net, place / "union.safetensors")
    plain = write_control_net(small_control_net(small), place / "plain")
    nets = {"union": union, "again": union, "plain": plain}
    pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls=nets)
    trace_control_graphs(pipeline, graphs)
    return pipeline, net, file, graphs


def draw(pipeline, *controls, **fields):
    return small_pictures.draw(pipeline, controls=controls, **fields)


def reference(net, images, modes, task="", **fields):
    own = SMALL["xl"].reference
    kind = getattr(diffusers, f"StableDiffusionXLControlNetUnion{task}Pipeline")
    pipeline = kind(**own.components, controlnet=net, add_watermarker=False)
    pipeline.scheduler = own.scheduler
    pipeline.set_progress_bar_config(disable=True)
    fields = {"controlnet_conditioning_scale": 1.0, **FIELDS, **fields}
    generator = torch.Generator().manual_seed(SEED)
    given = {"control_image": images, "control_mode": modes, "generator": generator}
    return pipeline(PROMPT, **given, **fields).images[0]


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


union = partial(Control, net="union")


def test_pictures_are_diffusers_own(loaded):
    pipeline, net, *_ = loaded
    for place, name in ((CANNY, "canny"), (DEPTH, "depth"), (REPAINT, "repaint")):
        theirs = reference(net, [HINT], [place])
        ours = draw(pipeline, union(image=HINT, type=name))
        assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
        assert same(draw(pipeline, union(image=HINT, type=str(place))), ours)
        for other in (union(image=HINT, type="normal"), union(image=TURNED, type=name)):
            assert psnr(draw(pipeline, other), theirs) < SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline), theirs) < SMALL_PICTURE_PSNR_DB / 2


def test_two_pictures_are_two_nets_of_diffusers(loaded):
    """Its list of one net twice; the net is loaded once, whatever its names."""
    pipeline, net, *_ = loaded
    theirs = reference(
        [net, net],
        [HINT, TURNED],
        [CANNY, DEPTH],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.2, 0.0],
        control_guidance_end=[0.8, 1.0],
    )
    first = union(image=HINT, type="mlsd", weight=0.7, start=0.2, end=0.8)
    second = partial(Control, image=TURNED, type="depth", weight=0.4)
    ours = draw(pipeline, first, second(net="union"))
    assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
    assert same(draw(pipeline, first, second(net="again")), ours)
    nets = pipeline.control_nets
    for part in ("control_hint", "control"):
        assert nets.engine("union", part) is nets.engine("again", part)
    assert len(nets.configs) == 2


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_over_a_picture_they_are_diffusers_own(loaded, task):
    pipeline, net, *_ = loaded
    fields = {"image": HINT.transpose(1), "strength": 0.6, "num_inference_steps": 6}
    control, theirs = union(image=TURNED, type="tile"), dict(fields)
    if task == "Inpaint":
        mask = Image.fromarray(np.uint8(255 * (np.indices((PIXELS, PIXELS))[1] < PIXELS // 2)))
        theirs["mask_image"] = mask
        fields |= {"mask": mask, "mask_blur": 0, "paste_back": False}
    picture = reference(net, [TURNED], [6], task, **theirs)
    assert psnr(draw(pipeline, control, **fields), picture) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, **fields), picture) < SMALL_PICTURE_PSNR_DB


def test_rows_of_one_call_are_what_they_are_alone(loaded):
    pipeline, *_ = loaded
    depth, canny = union(image=HINT, type="depth"), union(image=HINT, type="canny", weight=0.5)
    plain = Control(net="plain", image=TURNED)
    lists = [(), (depth,), (canny,), (plain, depth), (depth, canny)]
    fields = {**FIELDS, "sampler": "ddim"}
    requests = [
        Request(prompt=PROMPT, seed=seed, controls=controls, **fields)
        for seed, controls in enumerate(lists)
    ]
    sizes = []
    engine = pipeline.control_nets.engine("union", "control")
    run = engine.run
    engine.run = lambda given: sizes.append(len(given["hint"])) or run(given)
    try:
        together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=5)}
    finally:
        del engine.run
    assert sizes == [3, 2] * 4, "first and second places: three rows in one call, then two"
    for index, controls in enumerate(lists):
        assert same(together[index], draw(pipeline, *controls, seed=index))


def test_a_preprocessor_tells_the_type(loaded):
    pipeline, *_ = loaded
    edges = partial(union, image=HINT, preprocessor="canny:low=20,high=60")
    assert same(draw(pipeline, edges()), draw(pipeline, edges(type="lineart")))
    assert not same(draw(pipeline, edges()), draw(pipeline, edges(type="scribble")))
    blurred = partial(union, image=HINT, preprocessor="blur")
    assert same(draw(pipeline, blurred()), draw(pipeline, blurred(type="tile")))


def test_what_is_transparent_is_black(loaded):
    """As xinsir's and diffusers' examples of repainting show it."""
    pipeline, *_ = loaded
    pixels = np.asarray(HINT.convert("RGBA")).copy()
    pixels[:, : PIXELS // 2, 3] = 0
    black = pixels[..., :3] * (pixels[..., 3:] > 0)
    cut = union(image=Image.fromarray(pixels), type="repaint")
    assert same(draw(pipeline, cut), draw(pipeline, union(image=Image.fromarray(black), type="7")))


@pytest.mark.parametrize(
    ("net", "fields", "sentence"),
    [
        (
            "union",
            {},
            r"nothing tells .* give its type \(--control-type .*\): openpose, depth, ",
        ),
        ("union", {"preprocessor": "gray"}, "nothing tells what its picture is"),
        ("union", {"type": "8"}, f"knows {PROMAX} types of pictures, and '8' is none of them"),
        ("union", {"type": "edges"}, "a control's type is 'edges'; choose one of openpose, depth"),
        ("union", {"type": 3}, "a control's type is 3; choose one of"),
        ("plain", {"type": "canny"}, "'plain' came with the type 'canny', and is no union"),
    ],
)
def test_what_cannot_be_is_one_sentence(loaded, net, fields, sentence):
    pipeline, *_ = loaded
    with pytest.raises(RequestError, match=sentence):
        draw(pipeline, Control(net=net, image=HINT, **fields))


def test_the_command_line_and_the_same_picture_again(loaded, tmp_path, monkeypatch, capsys):
    *_, file, graphs = loaded
    HINT.save(tmp_path / "a.png")
    TURNED.save(tmp_path / "b.png")
    monkeypatch.chdir(file.parent)
    shared = ["--graphs", str(graphs), "--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--model", str(file), "--steps", "2", "--height", "64", "--width", "64"]
    asked += ["--control", "union.safetensors:0.8", "--control-image", str(tmp_path / "a.png")]
    asked += ["--control", "plain", "--control-image", str(tmp_path / "b.png")]
    out = [str(tmp_path / name) for name in ("one.png", "again.png", "other.png")]
    types = ["--control-type", "depth", "--control-type", "none"]
    assert main([*asked, *types, *shared, "--seed", "1", "--out", out[0]]) == 0
    assert read_settings(Path(out[0]))["control_types"] == ["depth", "none"]
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()
    types[1] = "canny"
    assert main(["--again", out[0], *types, *shared, "--out", out[2]]) == 0
    assert Path(out[0]).read_bytes() != Path(out[2]).read_bytes()
    capsys.readouterr()
    for said, sentence in (
        ([], "give its type (--control-type on a command line): openpose, depth"),
        (["--control-type", "depth"], "'plain' came with the type 'depth'"),
        (["--control-type", "sound", "--control-type", "none"], "a control's type is 'sound'"),
        (["--control-type", "depth"] * 3, "--control-type came 3 times for 2 of --control"),
    ):
        assert main([*asked, *said, *shared]) == 2
        assert sentence in capsys.readouterr().err
