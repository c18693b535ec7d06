"""T2I-Adapters against diffusers, beside ControlNets, and what turning them on and off costs."""

from functools import cache, partial
from pathlib import Path

import diffusers
import pytest
import torch

from engine.errors import ModelError
from runtime import Control, Hires, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support import small_pictures
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.fake_cuda import FakeDevice, moved
from tests.support.pictures import psnr, same
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    HINT,
    PIXELS,
    PROMPT,
    SEED,
    SETTINGS,
    TURNED,
    changes_of_engines,
    reference_pipeline,
    write_small,
)
from tests.support.t2i_adapters import small_t2i_adapter, write_t2i_adapter
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS
GRAY = HINT.convert("L")
# By the small model: what diffusers calls each adapter, whether it sees gray, and its file's names.
ADAPTERS = {
    "sd1": {
        "full": ("full_adapter", False, "folder"),
        "light": ("light_adapter", False, "original"),
        "sketch": ("full_adapter", True, "original"),
        "file": ("light_adapter", True, "diffusers"),
    },
    "xl": {
        "full": ("full_adapter_xl", False, "original"),
        "sketch": ("full_adapter_xl", True, "folder"),
    },
}
WIDTHS = (64, 128)


@pytest.fixture(scope="module")
def loaded(place):
    """Open a small model with its adapters, and for "sd1" a ControlNet "net"."""

    @cache
    def load(name):
        small, file, graphs = write_small(name, place)
        adapters, paths = {}, {}
        for seed, (adapter, (kind, gray, naming)) in enumerate(ADAPTERS[name].items()):
            adapters[adapter] = small_t2i_adapter(WIDTHS, kind=kind, gray=gray, seed=seed)
            path = file.parent / (adapter if naming == "folder" else f"{adapter}.safetensors")
            paths[adapter] = write_t2i_adapter(adapters[adapter], path, naming)
        nets = {}
        if name == "sd1":
            nets["net"] = small_control_net(small)
            paths["net"] = write_control_net(nets["net"], file.parent / "net")
        pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls=paths)
        if nets:
            trace_control_graphs(pipeline, graphs)
        return small, pipeline, adapters | nets, file, graphs

    return load


def draw(pipeline, *controls, **fields):
    return small_pictures.draw(pipeline, controls=controls, **fields)


def reference(small, adapter, images, **fields):
    kind = getattr(diffusers, f"{small.kind}AdapterPipeline")
    pipeline = reference_pipeline(kind, small, adapter=adapter)
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(PROMPT, generator=generator, image=images, **{**FIELDS, **fields}).images[0]


@pytest.mark.parametrize(("name", "adapter"), [(n, a) for n, of in ADAPTERS.items() for a in of])
def test_pictures_are_diffusers_own(loaded, name, adapter):
    small, pipeline, nets, *_ = loaded(name)
    gray = ADAPTERS[name][adapter][1]
    theirs = reference(small, nets[adapter], GRAY if gray else HINT)
    assert psnr(draw(pipeline, Control(net=adapter, image=HINT)), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline), theirs) < SMALL_PICTURE_PSNR_DB / 2
    turned = draw(pipeline, Control(net=adapter, image=TURNED))
    assert psnr(turned, theirs) < SMALL_PICTURE_PSNR_DB


def test_several_and_a_part_of_the_run_are_diffusers_own(loaded):
    small, pipeline, nets, *_ = loaded("sd1")
    nets["light"].adapter.total_downscale_factor = 16  # of the one feature less that it makes
    both = diffusers.MultiAdapter([nets["full"], nets["light"]])
    scale = {"adapter_conditioning_scale": [0.7, 0.4]}
    theirs = reference(small, both, [HINT, TURNED], **scale)
    controls = [
        Control(net="full", image=HINT, weight=0.7),
        Control(net="light", image=TURNED, weight=0.4),
    ]
    assert psnr(draw(pipeline, *controls), theirs) >= SMALL_PICTURE_PSNR_DB
    small, pipeline, nets, *_ = loaded("xl")
    half = {"adapter_conditioning_scale": 0.8, "adapter_conditioning_factor": 0.5}
    theirs = reference(small, nets["full"], HINT, **half)
    ended = Control(net="full", image=HINT, weight=0.8, end=0.5)
    assert psnr(draw(pipeline, ended), theirs) >= SMALL_PICTURE_PSNR_DB
    whole = draw(pipeline, Control(net="full", image=HINT, weight=0.8))
    assert psnr(whole, theirs) < SMALL_PICTURE_PSNR_DB


def test_on_and_off_and_in_other_weights_nothing_is_opened(loaded, monkeypatch):
    _, pipeline, *_ = loaded("sd1")
    one = partial(Control, net="full", image=HINT)
    plain, steered = draw(pipeline), draw(pipeline, one())
    changes = changes_of_engines(pipeline, monkeypatch)
    calls, adapter = [], pipeline.control_nets.engine("full", "t2i_adapter")
    run = adapter.run
    monkeypatch.setattr(adapter, "run", lambda g: calls.append(1) or run(g), raising=False)
    assert same(draw(pipeline), plain)
    assert not same(draw(pipeline, one(weight=0.5)), steered)
    assert not same(draw(pipeline, one(weight=(1.0, 0.0))), steered)
    assert not same(draw(pipeline, one(end=0.5)), steered)
    assert not same(draw(pipeline, one(mode="control")), draw(pipeline, one(mode="prompt")))
    assert same(draw(pipeline, one(weight=0)), plain), "which is no control at all"
    calls.clear()
    assert same(draw(pipeline, one()), steered)
    assert calls == [1], "once a picture"
    assert not changes


def test_rows_of_one_call_are_what_they_are_alone(loaded):
    _, pipeline, *_ = loaded("sd1")
    full, light = Control(net="full", image=HINT), Control(net="light", image=TURNED, weight=0.5)
    net, late = Control(net="net", image=HINT), Control(net="full", image=TURNED, start=0.5)
    lists = [(), (full,), (full, light), (light, full), (late,), (net, full), (light, net), (net,)]
    requests = [
        Request(prompt=PROMPT, seed=seed, controls=controls, **{**FIELDS, "sampler": "ddim"})
        for seed, controls in enumerate(lists)
    ]
    together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=8)}
    alone = [draw(pipeline, *controls, seed=seed) for seed, controls in enumerate(lists)]
    assert all(same(together[index], image) for index, image in enumerate(alone))
    for index, (without, seed) in {5: ((net,), 5), 6: ((light,), 6)}.items():
        assert not same(alone[index], draw(pipeline, *without, seed=seed)), "both steer"


def test_beside_other_variants_of_the_step(loaded):
    _, pipeline, *_ = loaded("sd1")
    control = Control(net="full", image=HINT)
    ways = (
        {"pag_scale": 2.0},
        {"apg": (0.0, 10.0, -0.5)},
        {"sampler": "euler_cfg_pp", "guidance_scale": 0.8},
        {"hires": Hires(scale=1.5, strength=0.5)},
        {"height": PIXELS - 8, "width": PIXELS + 8},
    )
    for fields in ways:
        assert not same(draw(pipeline, control, **fields), draw(pipeline, **fields)), fields


def test_one_of_another_family_is_one_sentence(loaded, place):
    _, pipeline, *_ = loaded("sd1")
    loaded("xl")
    before = pipeline.control_nets.names
    with pytest.raises(ModelError, match=r"is a T2I-Adapter of another family: it makes features"):
        pipeline.set_controls({"full": place / "xl" / "full.safetensors"})
    assert pipeline.control_nets.names == before


def test_the_command_line_and_the_same_picture_again(loaded, tmp_path, monkeypatch):
    *_, file, graphs = loaded("sd1")
    HINT.save(tmp_path / "edges.png")
    monkeypatch.chdir(file.parent)
    shared = ["--graphs", str(graphs), "--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--model", str(file), "--steps", "2", "--height", "64", "--width", "64"]
    steered = ["--control", "light.safetensors:0.8@0:0.5"]
    steered += ["--control-image", str(tmp_path / "edges.png")]
    out = [str(tmp_path / name) for name in ("one.png", "again.png")]
    assert main([*asked, *steered, *shared, "--seed", "1", "--out", out[0]]) == 0
    settings = read_settings(Path(out[0]))
    assert settings["controls"] == ["light.safetensors:0.8@0:0.5"]
    assert {"light.safetensors", "edges.png"} <= settings["hashes"].keys()
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()


@pytest.mark.parametrize("has_addresses", [True, False])
def test_pictures_are_the_same_on_a_device(loaded, has_addresses):
    """Adapters of four features and of three, beside a ControlNet, over a part of the run."""
    _, host, nets, file, graphs = loaded("sd1")
    paths = {name: host.control_nets.path(name) for name in nets}
    pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, controls=paths)
    device = FakeDevice(has_addresses=has_addresses)
    moved(pipeline, device)
    for controls in (
        [Control(net="full", image=HINT, weight=(1.0, 0.3), mode="control")],
        [
            Control(net="light", image=TURNED, weight=0.4, end=0.5),
            Control(net="net", image=HINT, weight=0.7),
            Control(net="full", image=HINT),
        ],
    ):
        for fields in ({}, {"sampler": "euler_a", "num_images_per_prompt": 2}):
            expected = draw(host, *controls, **fields)
            for _ in range(4 if has_addresses else 1):
                device.counts.clear()
                assert same(draw(pipeline, *controls, **fields), expected)
            assert device.counts["replay"] == int(has_addresses)
    requests = [
        Request(prompt=PROMPT, sampler="ddim", controls=[control], **{**FIELDS, "seed": SEED})
        for control in controls[::2]
    ]
    for image in pipeline.draw(requests, batch_size=2):
        assert same(image.image, draw(host, *requests[image.request].controls))
