"""ControlNets against diffusers, and what turning them on and off costs."""

from functools import cache, partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from engine.backends.settings import BackendSettings
from engine.errors import BackendError, LatentrtError, ModelError, RequestError
from runtime import Control, Hires, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support import small_pictures
from tests.support.controls import (
    small_control_net,
    trace_control_graphs,
    write_control_lora,
    write_control_net,
)
from tests.support.fake_cuda import FakeDevice, moved
from tests.support.pictures import psnr, same
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    HINT,
    LEFT,
    PROMPT,
    SEED,
    SETTINGS,
    TURNED,
    changes_of_engines,
    reference_pipeline,
    write_small,
)
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS


@pytest.fixture(scope="module")
def loaded(place):
    """Open a small model with two ControlNets, "a" and "b", and diffusers' own."""

    @cache
    def load(name):
        small, file, graphs = write_small(name, place)
        nets = {net: small_control_net(small, seed) for seed, net in enumerate("ab")}
        paths = {net: write_control_net(made, file.parent / net) for net, made in nets.items()}
        pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls=paths)
        trace_control_graphs(pipeline, graphs)
        return small, pipeline, nets, file, graphs

    return load


def draw(pipeline, *controls, **fields):
    return small_pictures.draw(pipeline, controls=controls, **fields)


def reference(small, nets, images, task="", **fields):
    kind = getattr(diffusers, f"{small.kind}ControlNet{task}Pipeline")
    pipeline = reference_pipeline(kind, small, controlnet=nets)
    fields = {**FIELDS, **fields, "control_image" if task else "image": images}
    fields.setdefault("controlnet_conditioning_scale", 1.0)  # theirs is another in every task
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(PROMPT, generator=generator, **fields).images[0]


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_pictures_are_diffusers_own(loaded, name):
    small, pipeline, nets, *_ = loaded(name)
    theirs = reference(small, nets["a"], HINT)
    assert psnr(draw(pipeline, Control(net="a", image=HINT)), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline), theirs) < SMALL_PICTURE_PSNR_DB / 2
    for other in (Control(net="b", image=HINT), Control(net="a", image=TURNED)):
        assert psnr(draw(pipeline, other), theirs) < SMALL_PICTURE_PSNR_DB
    theirs = reference(
        small,
        [nets["a"], nets["b"]],
        [HINT, TURNED],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.2, 0.0],
        control_guidance_end=[0.8, 1.0],
    )
    first = partial(Control, net="a", image=HINT, weight=0.7)
    second = Control(net="b", image=TURNED, weight=0.4)
    ours = draw(pipeline, first(start=0.2, end=0.8), second)
    assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, first(), second), theirs) < SMALL_PICTURE_PSNR_DB


def test_a_control_lora_is_diffusers_own_once_it_is_merged(loaded, place):
    small, pipeline, nets, file, graphs = loaded("sd1")
    merged = small_control_net(small, 2)
    lora = write_control_lora(small, merged, place / "control-lora.safetensors")
    other = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls={"a": lora})
    ours = draw(other, Control(net="a", image=HINT))
    assert psnr(ours, reference(small, merged, HINT)) >= SMALL_PICTURE_PSNR_DB
    assert psnr(ours, reference(small, nets["a"], HINT)) < SMALL_PICTURE_PSNR_DB / 2
    assert same(draw(other), draw(pipeline)), "no weight of the model has changed"


def test_image_to_image_is_diffusers_own(loaded):
    small, pipeline, nets, *_ = loaded("sd1")
    image, steps = HINT.transpose(1), {"num_inference_steps": 6}
    for strength in (0.5, 1.0):
        fields = {"image": image, "strength": strength, **steps}
        theirs = reference(small, nets["a"], TURNED, "Img2Img", **fields)
        ours = draw(pipeline, Control(net="a", image=TURNED), **fields)
        assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
        assert psnr(draw(pipeline, **fields), theirs) < SMALL_PICTURE_PSNR_DB


def test_inpainting_is_diffusers_own(loaded):
    small, pipeline, nets, *_ = loaded("sd1")
    fields = {"image": HINT.transpose(1), "strength": 0.6, "num_inference_steps": 6}
    theirs = reference(small, nets["a"], TURNED, "Inpaint", mask_image=LEFT, **fields)
    fields |= {"mask": LEFT, "mask_blur": 0, "paste_back": False}
    ours = draw(pipeline, Control(net="a", image=TURNED), **fields)
    assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, **fields), theirs) < SMALL_PICTURE_PSNR_DB


def test_on_and_off_and_in_other_weights_nothing_is_opened(loaded, monkeypatch):
    _, pipeline, *_ = loaded("sd1")
    one = partial(Control, net="a", image=HINT)
    plain, steered = draw(pipeline), draw(pipeline, one())
    changes = changes_of_engines(pipeline, monkeypatch)
    assert same(draw(pipeline), plain)
    assert not same(draw(pipeline, one(weight=0.5)), steered)
    assert not same(draw(pipeline, one(weight=(1.0, 0.0))), steered)
    assert not same(draw(pipeline, one(end=0.5)), steered)
    assert not same(draw(pipeline, one(mode="control")), draw(pipeline, one(mode="prompt")))
    assert not same(draw(pipeline, one(), one(image=TURNED)), steered)
    assert same(draw(pipeline, one(weight=0)), plain), "which is no control at all"
    assert same(draw(pipeline, one()), steered)
    assert not changes


def test_rows_of_one_call_are_what_they_are_alone(loaded):
    _, pipeline, *_ = loaded("sd1")
    a, b = Control(net="a", image=HINT), Control(net="b", image=TURNED, weight=0.5)
    late, fields = Control(net="a", image=TURNED, start=0.5), {**FIELDS, "sampler": "ddim"}
    lists = [(), (a,), (a, b), (b, a), (late,)]
    requests = [
        Request(prompt=PROMPT, seed=seed, controls=controls, **fields)
        for seed, controls in enumerate(lists)
    ]
    sizes = []
    run = pipeline.engine("step_controlled").run
    pipeline.engine("step_controlled").run = lambda given: (
        sizes.append(len(given["noise"])) or run(given)
    )
    try:
        together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=5)}
    finally:
        del pipeline.engine("step_controlled").run
    assert sizes == [4] * 4, "one call for the four that are controlled, late ones at weight 0 too"
    for index, controls in enumerate(lists):
        assert same(together[index], draw(pipeline, *controls, seed=index))


def test_hires_and_several_pictures(loaded):
    _, pipeline, *_ = loaded("sd1")
    control = Control(net="a", image=HINT)
    larger = Hires(scale=1.5, strength=0.5)
    assert draw(pipeline, control, hires=larger).size == (96, 96)
    assert not same(draw(pipeline, control, hires=larger), draw(pipeline, hires=larger))
    fields = {**FIELDS, "sampler": "ddim", "seed": SEED, "num_images_per_prompt": 2}
    images = pipeline(PROMPT, controls=[control], **fields).images
    for index, image in enumerate(images):
        assert same(image, draw(pipeline, control, seed=SEED + index))


def test_what_cannot_be_is_one_sentence(loaded, place):
    _, pipeline, _, file, graphs = loaded("sd1")
    *_, of_xl, _ = loaded("xl")
    with pytest.raises(ModelError, match=r"another family: it attends to texts of the width 128"):
        pipeline.set_controls({"a": of_xl.parent / "a"})
    with pytest.raises(ModelError, match="is a model or a UNet, which cannot be used as one"):
        pipeline.set_controls([file])
    with pytest.raises(ModelError, match="does not exist"):
        pipeline.set_controls("nowhere.safetensors")
    assert pipeline.control_nets.names == ("a", "b"), "they stay"
    with pytest.raises(RequestError, match=r"the control 'depth' is not loaded \('a', 'b' are\)"):
        draw(pipeline, Control(net="depth", image=HINT))
    other = Pipeline.load(file, graphs=graphs, settings=BackendSettings(backend="cpu"))
    other.engines.settings = BackendSettings(backend="tensorrt")
    with pytest.raises(BackendError, match="'tensorrt' runs no ControlNets yet"):
        other.set_controls({"a": file.parent / "a"})


def test_the_command_line_and_the_same_picture_again(loaded, tmp_path, monkeypatch, capsys):
    *_, file, graphs = loaded("sd1")
    HINT.save(tmp_path / "edges.png")
    monkeypatch.chdir(file.parent)
    shared = ["--graphs", str(graphs), "--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--model", str(file), "--steps", "2", "--height", "64", "--width", "64"]
    steered = ["--control", "a:0.8@0:0.5", "--control-image", str(tmp_path / "edges.png")]
    out = [str(tmp_path / name) for name in ("one.png", "again.png", "more.png")]
    assert main([*asked, *steered, *shared, "--seed", "1", "--out", out[0]]) == 0
    settings = read_settings(Path(out[0]))
    assert settings["controls"] == ["a:0.8@0:0.5"]
    assert settings["control_images"] == ["edges.png"]
    assert {"a", "edges.png"} <= settings["hashes"].keys()
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()
    assert main(["--again", out[0], "--control", "a", *shared, "--out", out[2]]) == 0
    assert Path(out[0]).read_bytes() != Path(out[2]).read_bytes()
    capsys.readouterr()
    assert main([*asked, "--control", "a", *shared]) == 2
    message = capsys.readouterr().err
    assert "--control came 1 times and --control-image 0 times; give them in pairs" in message


def test_a_failed_net_leaves_the_pipeline_as_it_was(loaded, monkeypatch):
    _, pipeline, *_ = loaded("sd1")
    control = Control(net="a", image=HINT)
    expected = draw(pipeline, control)
    engine = pipeline.control_nets.engine("a", "control")

    def fail(given):
        raise BackendError("out of memory")

    monkeypatch.setattr(engine, "run", fail, raising=False)
    with pytest.raises(LatentrtError, match="out of memory"):
        draw(pipeline, control)
    monkeypatch.undo()
    assert same(draw(pipeline, control), expected)


STEERED = {  # controls, and fields of the request
    "one, counting less": ([("a", 0.6, {})], {}),
    "two nets, one of them twice": (
        [("a", 1, {}), ("b", 0.5, {}), ("a", 0.3, {"turned": True})],
        {},
    ),
    "a part of the run": ([("a", 1, {"start": 0.25, "end": 0.75})], {"sampler": "euler_a"}),
    "a curve, guided for a while": (
        [("a", (1.0, 0.2), {"mode": "control"})],
        {"guidance_interval": (0.0, 0.5)},
    ),
    "several pictures": ([("b", 1, {})], {"num_images_per_prompt": 2, "sampler": "dpmpp_2m"}),
    "deep features kept": ([("a", 1, {"end": 0.7})], {"cache_interval": 2}),
}


def steering(controls):
    return [
        Control(net=net, image=TURNED if more.pop("turned", False) else HINT, weight=weight, **more)
        for net, weight, more in ((net, weight, {**more}) for net, weight, more in controls)
    ]


def pictures(pipeline, controls, **fields):
    fields = {"sampler": "ddim", "seed": SEED, **FIELDS, **fields}
    drawn = pipeline(PROMPT, controls=steering(controls), **fields)
    return [np.asarray(image) for image in drawn.images]


def on_device(loaded, **options):
    _, _, _, file, graphs = loaded("sd1")
    paths = {net: file.parent / net for net in "ab"}
    device = FakeDevice(**options)
    pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls=paths)
    return moved(pipeline, device), device


@pytest.mark.parametrize("has_addresses", [True, False])
def test_pictures_are_the_same_on_a_device(loaded, has_addresses):
    """Call by call, recorded, proven, launched; and where every step is watched."""
    _, host, *_ = loaded("sd1")
    pipeline, device = on_device(loaded, has_addresses=has_addresses)
    for name, (controls, fields) in STEERED.items():
        expected = pictures(host, controls, **fields)
        for _ in range(4 if has_addresses else 1):
            device.counts.clear()
            np.testing.assert_array_equal(pictures(pipeline, controls, **fields), expected, name)
        assert device.counts["replay"] == int(has_addresses), name
        request = Request(
            prompt=PROMPT,
            controls=steering(controls),
            **{"sampler": "ddim", "seed": SEED, **FIELDS, **fields},
        )
        for theirs, ours in zip(
            *([*p.denoise(p.plan(request))] for p in (host, pipeline)), strict=True
        ):
            np.testing.assert_array_equal(theirs.latents, ours.latents, name)
            np.testing.assert_array_equal(theirs.denoised(), ours.denoised(), name)


def test_weights_change_on_a_device_without_a_recording_or_more_memory(loaded):
    _, host, *_ = loaded("sd1")
    pipeline, device = on_device(loaded)
    for _ in range(4):
        pictures(pipeline, [("a", 1, {})])
    device.counts.clear()
    pictures(pipeline, [("a", 1, {})])
    before = dict(device.counts)
    assert before["replay"] == 1
    for weight, more in ((0.3, {}), ((1.0, 0.1), {}), (0.7, {"mode": "prompt"})):
        device.counts.clear()
        controls = [("a", weight, more)]
        np.testing.assert_array_equal(pictures(pipeline, controls), pictures(host, controls))
        assert dict(device.counts) == before
    device.counts.clear()
    pictures(pipeline, [("a", 1, {"turned": True})])
    assert dict(device.counts) == before, "and the picture"


def test_what_nets_add_stays_on_the_device(loaded):
    pipeline, device = on_device(loaded)
    plan = pipeline.plan(
        Request(prompt=PROMPT, controls=steering([("a", 1, {}), ("b", 1, {})]), **FIELDS)
    )
    state = pipeline.start(plan)
    device.counts.clear()
    pipeline._run(plan, state)
    assert device.counts["download"] == device.counts["wait"] == device.counts["run"] == 0


def test_unlike_rows_on_a_device_have_nets_of_their_own(loaded):
    """Other nets, weights and parts of the run beside each other; an order of one's own."""
    _, host, *_ = loaded("sd1")
    pipeline, device = on_device(loaded)
    chosen = [
        [("a", 0.8, {})],
        [("b", 1, {"mode": "control"}), ("a", 0.5, {"turned": True})],
        [("a", 1, {"end": 0.5}), ("b", 0.4, {})],
        [("b", (0.2, 1.0), {})],
    ]
    more = [{}, {"sampler": "lms"}, {"cache_interval": 2}, {"num_inference_steps": 6}]
    fields = [{"sampler": "ddim", "seed": SEED, **FIELDS, **each} for each in more]
    requests = [
        Request(prompt=PROMPT, controls=steering(controls), **each)
        for controls, each in zip(chosen, fields, strict=True)
    ]
    for _ in range(2):
        drawn = {each.request: each.image for each in pipeline.draw(requests, batch_size=4)}
        for number, (controls, each) in enumerate(zip(chosen, fields, strict=True)):
            (wanted,) = pictures(host, controls, **each)
            np.testing.assert_array_equal(np.asarray(drawn[number]), wanted, str(controls))
    assert device.counts["replay"] > 0


def test_whoever_watches_a_steered_run_on_a_device_sees_the_processors(loaded):
    _, host, *_ = loaded("sd1")
    pipeline, _ = on_device(loaded)
    seen = []

    def watch(own, step, timestep, told):
        seen.append(told["latents"].copy())
        return {}

    controls = [("a", 1, {}), ("b", 0.5, {})]
    for each in (host, pipeline):
        pictures(each, controls, callback_on_step_end=watch)
    half = len(seen) // 2
    np.testing.assert_array_equal(seen[:half], seen[half:])
