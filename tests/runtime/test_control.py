"""A control by itself: what its weights come to, how it is written, what it refuses."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from engine.errors import RequestError
from runtime.control import DECAY, Control, checked_controls, control_fields, parse_control
from runtime.control_options import controls_of
from runtime.denoising.controls import hint_pixels
from runtime.image_prompt import ImagePrompt
from runtime.images.frame import Frame
from runtime.pipeline import Pipeline
from runtime.preprocessors.named import Canny
from runtime.request import Request
from runtime.steering import Steering

IMAGE = Image.new("RGB", (16, 8), (255, 0, 51))


def control(**fields):
    return Control(**{"net": "canny", "image": IMAGE, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"weight": 0.5}, [0.5] * 4),
        ({"weight": (1.0, 0.25)}, [1, 0.75, 0.5, 0.25]),
        ({"start": 0.25}, [0, 1, 1, 1]),
        ({"start": 0.2, "end": 0.8}, [0, 1, 1, 0]),  # diffusers: i / n >= start, (i + 1) / n <= end
        ({"end": 0.5}, [1, 1, 0, 0]),
        ({"start": 0.6, "end": 0.7}, [0, 0, 0, 0]),
    ],
)
def test_weights_over_a_run(fields, expected):
    assert np.allclose(control(**fields).over(4), expected)


def test_what_is_more_important():
    """The deepest residual counts whole, each before it 0.825 of the next (Automatic1111's)."""
    soft = DECAY ** np.arange(12, -1, -1)
    assert np.array_equal(control().by_map(soft, 2, 1), np.ones((13, 2)))
    assert np.allclose(control(mode="prompt").by_map(soft, 2, 1), np.stack([soft, soft], 1))
    wanted = np.stack([0 * soft, 0 * soft, soft, soft], 1)
    assert np.allclose(control(mode="control").by_map(soft, 4, 2), wanted)
    assert np.allclose(control(mode="control").by_map(soft, 1, 1), soft[:, None])


def conditioning(*perturbed):
    """Return calls of one negative text and one prompt, with groups of perturbed attention."""
    return [
        {
            "guidance": np.ones((2 + count, 1), np.float32),
            "perturbed": np.repeat([[0], [1], [0]], [1, count, 1], axis=0),
        }
        for count in perturbed
    ]


def test_a_control_that_does_not_count_is_not_computed():
    calls = [{"guidance": np.ones((groups, 1), np.float32)} for groups in (2, 2, 1, 1)]
    never = control(net="never", weight=0)
    controls = [control(end=0.5), never, control(net="depth")]
    fields = control_fields(controls, {}, 5, calls, 1)
    made = fields["control_calls"]
    assert [each.net for each in fields["controls"]] == ["canny", "depth"]
    assert [[c.net for c in call] for call in made] == [["canny", "depth"]] * 2 + [["depth"]] * 2
    assert [call[-1].weights.shape for call in made] == [(5, 2, 1)] * 2 + [(5, 1, 1)] * 2
    assert [call[-1].place for call in made] == [1] * 4
    assert fields["is_controlled"]
    assert not control_fields([never], {}, 5, calls, 1)["control_calls"]


def test_the_negative_text_is_left_alone_at_calls_without_perturbed_groups_too():
    """With CFG++ it is there outside the part that is guided, where nothing is perturbed."""
    fields = control_fields([control(mode="control")], {}, 5, conditioning(0, 1, 0), 1)
    steered = [(call[0].weights[..., 0] > 0).all(0).tolist() for call in fields["control_calls"]]
    assert steered == [[False, True], [False, True, True], [False, True]]


def test_a_t2i_adapter_counts_by_feature():
    calls = [{"guidance": np.ones((2, 1), np.float32)}] * 2
    controls = [control(mode="control"), control(net="depth")]
    fields = control_fields(controls, {"canny": 4}, 13, calls, 1)
    adapter, net = fields["control_calls"][0]
    assert np.allclose(adapter.weights[..., 0], [[0, x] for x in (0.25, 0.62, 0.825, 1)])
    assert net.weights.shape == (13, 2, 1)
    assert fields["is_controlled"]
    assert not control_fields(controls[:1], {"canny": 4}, 13, calls, 1)["is_controlled"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny.pth", ("canny.pth", (1.0,), 0.0, 1.0)),
        ("a/canny.safetensors:0.8", ("a/canny.safetensors", (0.8,), 0.0, 1.0)),
        (r"C:\nets\canny.pth", (r"C:\nets\canny.pth", (1.0,), 0.0, 1.0)),
        (r"C:\nets\canny.pth:.5@0.2:0.8", (r"C:\nets\canny.pth", (0.5,), 0.2, 0.8)),
        ("canny:1,0.5@0:0.5", ("canny", (1.0, 0.5), 0.0, 0.5)),
        ("a@1:2", ("a@1", (2.0,), 0.0, 1.0)),
        ("net:x", ("net:x", (1.0,), 0.0, 1.0)),
    ],
)
def test_how_it_is_written(text, expected):
    assert parse_control(text) == expected
    net, weights, start, end = expected
    written = control(net=net, weight=weights, start=start, end=end).text
    assert parse_control(written) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"net": ""}, "a control's net is ''; give a ControlNet's name"),
        ({"image": "edges.png"}, "a control's image came as str"),
        ({"weight": -1}, "a control's weight is -1; give a number from 0 to 10"),
        ({"weight": (1.0, float("nan"))}, "a control's weight is nan"),
        ({"weight": "1"}, "a control's weight is '1'"),
        ({"start": 2}, "a control's start is 2; give a number from 0 to 1"),
        ({"start": 0.5, "end": 0.2}, "it must not end before it starts"),
        ({"mode": "loud"}, "a control's mode is 'loud'; choose one of balanced, prompt, control"),
    ],
)
def test_what_it_refuses(fields, message):
    with pytest.raises(RequestError, match=message):
        control(**fields)


@pytest.mark.parametrize("controls", ["canny", 3, [IMAGE], [control()] * 17])
def test_what_are_no_controls(controls):
    with pytest.raises(RequestError, match=r"^controls "):
        checked_controls(controls)
    assert len(checked_controls(control())) == 1


def test_the_picture_as_a_net_sees_it():
    pixels = hint_pixels(IMAGE)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 8, 16), np.float32)
    assert np.allclose(pixels[0, :, 0, 0], [1, 0, 0.2])
    assert np.allclose(hint_pixels(IMAGE.convert("L")).std(axis=1), 0), "gray is in all channels"
    cut = IMAGE.convert("RGBA")
    cut.putpixel((3, 2), (255, 0, 51, 0))
    assert np.array_equal(hint_pixels(cut)[0, :, 2, 3], [-1, -1, -1])
    assert np.array_equal(np.argwhere(hint_pixels(cut)[0, 0] == -1), [[2, 3]])


def test_the_part_of_the_picture_that_is_drawn():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 32, 64, 64))
    frame = Frame.masked(Image.new("RGB", (64, 64)), mask, 32, 32, 0)
    hint = Image.new("RGB", (128, 128))
    hint.paste((0, 255, 0), (64, 64, 128, 128))
    assert np.asarray(frame.drawn(hint))[4:-4, 4:-4].min(axis=(0, 1)).tolist() == [0, 255, 0]
    assert frame.drawn(hint).size == (32, 32)


def options_of(folder, *, count=2, **said):
    image = folder / "edges.png"
    Image.new("RGB", (8, 8), "white").save(image)
    return argparse.Namespace(
        controls=["a", "b"][:count],
        control_images=[image] * count,
        control_modes=said.get("modes", []),
        control_types=said.get("types", []),
        control_preprocessors=said.get("made", []),
    )


def test_preprocessors_are_for_all_controls_or_for_each(tmp_path):
    both = controls_of(options_of(tmp_path, made=["canny:low=20,high=60"]))
    assert [control.preprocessor_text for control in both] == ["canny:low=20,high=60"] * 2
    one, other = controls_of(options_of(tmp_path, made=["gray", "none"]))
    assert (one.preprocessor_text, other.preprocessor_text) == ("gray", "none")
    assert other.shown(one.image) is one.image, "what has none is taken as it is"
    with pytest.raises(RequestError, match="--preprocessor came 3 times for 2 of --control"):
        controls_of(options_of(tmp_path, made=["gray"] * 3))
    with pytest.raises(RequestError, match="--preprocessor came 1 times for 0"):
        controls_of(options_of(tmp_path, count=0, made=["gray"]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cany", "no preprocessor 'cany'; did you mean 'canny'. There are canny, scribble"),
        ("canny:sigma=1", "'sigma' is no option of the preprocessor canny; it has low, high"),
        ("canny:", "'' is no option of the preprocessor canny"),
        ("gray:low=1", "it has none"),
        ("canny:low=high", "low of canny is 'high'; give a number"),
        ("scribble:threshold=1.5", "threshold of scribble is '1.5'; give a whole number"),
        ("canny:l2_norm=perhaps", "give true or false"),
        ("canny:low=-1", "low"),
        ("blur:sigma=nan", "sigma"),
    ],
)
def test_what_is_no_preprocessor_is_one_sentence(text, sentence):
    with pytest.raises(RequestError, match=sentence):
        Control(net="a", image=Image.new("RGB", (8, 8)), preprocessor=text)
    with pytest.raises(RequestError, match="preprocessor is 7"):
        Control(net="a", image=Image.new("RGB", (8, 8)), preprocessor=7)


def test_a_preprocessor_sees_the_picture_in_the_size_that_is_drawn():
    picture = Image.fromarray(np.uint8(255 * (np.indices((64, 64))[1] < 32)))
    given = Control(net="a", image=picture, preprocessor="canny:low=50,high=100,l2-norm=true")
    assert np.array_equal(
        np.asarray(given.shown(picture.convert("RGB"))),
        Canny(low=50, high=100, l2_norm=True)(np.asarray(picture.convert("RGB"))),
    )
    assert given.shown(picture.resize((128, 96))).size == (128, 96)
    own = Control(net="a", image=picture, preprocessor=Canny())
    assert own.preprocessor_text == "Canny"


@pytest.mark.parametrize(("part", "notes"), [((0.6, 0.7), 1), ((0.0, 1.0), 0), ((0.5, 0.8), 0)])
def test_what_steers_no_step_is_said(part, notes):
    start, end = part
    plan = Pipeline.load("pictogram").plan(Request(prompt="a", num_inference_steps=4))
    picture = Image.new("RGB", (8, 8))
    steers = {"net": "edges", "image": picture, "start": start, "end": end}
    seen = ImagePrompt(image=picture, start=start, end=end)
    request = Request(prompt="a", controls=[control(**steers)], image_prompts=[seen])
    there = SimpleNamespace(controlled=SimpleNamespace(steered=lambda plan: plan))
    said = Steering.steered(there, plan, request).notes
    assert [note.startswith("the control edges:1@") for note in said] == [True, False][: 2 * notes]
    assert all("none of 4 steps" in note for note in said)
    off = Request(prompt="a", controls=[control(**steers, weight=0.0)])
    assert not Steering.steered(there, plan, off).notes
