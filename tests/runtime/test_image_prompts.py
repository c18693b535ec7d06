"""Image prompts against diffusers' IP-Adapters, and what turning them on and off costs."""

from functools import cache, partial
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor

from engine.backends.settings import BackendSettings
from engine.errors import BackendError, ModelError, RequestError
from engine.model import Model
from runtime import Control, Hires, ImagePrompt, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support import small_pictures
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.fake_cuda import FakeDevice, moved
from tests.support.ip_adapters import (
    KINDS,
    seeing_pipeline,
    small_encoder,
    small_ip_adapter,
    trace_ip_graphs,
    write_ip_adapter,
)
from tests.support.pictures import drawing, psnr, same
from tests.support.small_models import SMALL
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    LEFT,
    PIXELS,
    PROMPT,
    SEED,
    SETTINGS,
    changes_of_engines,
    write_small,
)
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB
from tests.support.traced import trace_once

pytestmark = DEPRECATIONS
PICTURE = drawing(40, 28)
OTHER = drawing(28, 28).transpose(1)


@pytest.fixture(scope="module")
def loaded(place):
    """Open a small model with an IP-Adapter of each kind."""
    encoder = small_encoder()
    encoder.save_pretrained(place / "image_encoder")

    @cache
    def load(name):
        small, file, graphs = write_small(name, place, place)
        states = {kind: small_ip_adapter(small, kind) for kind in KINDS}
        paths = {
            kind: write_ip_adapter(state, place / f"{name}-{kind}.bin")
            for kind, state in states.items()
        }
        trace_ip_graphs(Model.open(file), graphs)
        pipeline = Pipeline.load(file, graphs=graphs, settings=SETTINGS, ip_adapters=paths)
        return small, pipeline, states, encoder, file

    return load


def draw(pipeline, *prompts, **fields):
    return small_pictures.draw(pipeline, image_prompts=prompts, **fields)


def reference(small, states, encoder, images, scales=1.0, task="", **fields):
    kind = getattr(diffusers, f"{small.kind}{task}Pipeline")
    pipeline = seeing_pipeline(kind, small, states, encoder, scales)
    generator = torch.Generator().manual_seed(SEED)
    fields = {**FIELDS, **fields}
    return pipeline(PROMPT, ip_adapter_image=images, generator=generator, **fields).images[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_pictures_are_diffusers_own(loaded, name, kind):
    small, pipeline, states, encoder, _ = loaded(name)
    theirs = reference(small, [states[kind]], encoder, [PICTURE], 0.7)
    prompt = ImagePrompt(image=PICTURE, adapter=kind, scale=0.7)
    assert psnr(draw(pipeline, prompt), theirs) >= SMALL_PICTURE_PSNR_DB
    for others in (
        (),
        (ImagePrompt(image=OTHER, adapter=kind, scale=0.7),),
        (ImagePrompt(image=PICTURE, adapter=kind, scale=0.5),),
    ):
        assert psnr(draw(pipeline, *others), theirs) < SMALL_PICTURE_PSNR_DB - 10


def test_several_pictures_and_adapters(loaded):
    small, pipeline, states, encoder, _ = loaded("sd1")
    for kind in ("linear", "plus"):
        theirs = reference(small, [states[kind]], encoder, [[PICTURE, OTHER]])
        prompt = ImagePrompt(image=[PICTURE, OTHER], adapter=kind)
        assert psnr(draw(pipeline, prompt), theirs) >= SMALL_PICTURE_PSNR_DB
    both = [states["linear"], states["plus"]]
    theirs = reference(small, both, encoder, [PICTURE, OTHER], [0.6, 0.3])
    ours = [
        ImagePrompt(image=PICTURE, adapter="linear", scale=0.6),
        ImagePrompt(image=OTHER, adapter="plus", scale=0.3),
    ]
    assert psnr(draw(pipeline, *ours), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, ours[0]), theirs) < SMALL_PICTURE_PSNR_DB - 10


@pytest.mark.parametrize("size", [(PIXELS, PIXELS), (PIXELS, 2 * PIXELS)])
def test_masks_are_diffusers_own(loaded, size):
    small, pipeline, states, encoder, _ = loaded("sd1")
    sides = dict(zip(("height", "width"), size, strict=True))
    left = LEFT.rotate(30, fillcolor=0).resize((91, 57))
    right = left.transpose(0)
    masks = IPAdapterMaskProcessor().preprocess([left, right], **sides)
    masks = [masks.reshape(1, 2, *size)]
    theirs = reference(
        small,
        [states["plus"]],
        encoder,
        [[PICTURE, OTHER]],
        [[0.9, 0.5]],
        cross_attention_kwargs={"ip_adapter_masks": masks},
        **sides,
    )
    ours = [
        ImagePrompt(image=PICTURE, adapter="plus", scale=0.9, mask=left),
        ImagePrompt(image=OTHER, adapter="plus", scale=0.5, mask=right),
    ]
    assert psnr(draw(pipeline, *ours, **sides), theirs) >= SMALL_PICTURE_PSNR_DB
    swapped = [
        ImagePrompt(image=PICTURE, adapter="plus", scale=0.9, mask=right),
        ImagePrompt(image=OTHER, adapter="plus", scale=0.5, mask=left),
    ]
    assert psnr(draw(pipeline, *swapped, **sides), theirs) < SMALL_PICTURE_PSNR_DB - 10


def test_without_guidance_and_image_to_image(loaded):
    small, pipeline, states, encoder, _ = loaded("sd1")
    prompt = ImagePrompt(image=PICTURE, adapter="plus")
    fields = {"guidance_scale": 1.0}
    theirs = reference(small, [states["plus"]], encoder, [PICTURE], **fields)
    assert psnr(draw(pipeline, prompt, **fields), theirs) >= SMALL_PICTURE_PSNR_DB
    fields = {"image": drawing(PIXELS, PIXELS), "strength": 0.5, "num_inference_steps": 6}
    sizes = {"height": None, "width": None}
    own = {name: value for name, value in FIELDS.items() if name not in sizes}
    kind = diffusers.StableDiffusionImg2ImgPipeline
    other = seeing_pipeline(kind, small, [states["plus"]], encoder)
    generator = torch.Generator().manual_seed(SEED)
    theirs = other(PROMPT, ip_adapter_image=[PICTURE], generator=generator, **{**own, **fields})
    ours = draw(pipeline, prompt, **fields)
    assert psnr(ours, theirs.images[0]) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, **fields), theirs.images[0]) < SMALL_PICTURE_PSNR_DB - 10


def test_a_control_net_beside_it(loaded, place):
    small, pipeline, states, encoder, _ = loaded("sd1")
    net = small_control_net(small)
    pipeline.set_controls({"edges": write_control_net(net, place / "edges")})
    trace_control_graphs(pipeline, place / "graphs")
    trace_ip_graphs(pipeline.model, place / "graphs", ("step_controlled_ip",))
    kind = diffusers.StableDiffusionControlNetPipeline
    other = seeing_pipeline(kind, small, [states["plus"]], encoder, 0.8, controlnet=net)
    generator, hint = torch.Generator().manual_seed(SEED), drawing(PIXELS, PIXELS)
    given = {"image": hint, "ip_adapter_image": [PICTURE], "generator": generator, **FIELDS}
    theirs = other(PROMPT, **given).images[0]
    prompt = ImagePrompt(image=PICTURE, adapter="plus", scale=0.8)
    control = Control(net="edges", image=hint)
    assert psnr(draw(pipeline, prompt, controls=[control]), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, prompt), theirs) < SMALL_PICTURE_PSNR_DB - 10
    assert psnr(draw(pipeline, controls=[control]), theirs) < SMALL_PICTURE_PSNR_DB - 10


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0}])
def test_perturbed_attention_beside_it(loaded, fields):
    small, pipeline, states, encoder, _ = loaded("sd1")
    kind = partial(diffusers.StableDiffusionPAGPipeline, pag_applied_layers="mid")
    other = seeing_pipeline(kind, small, [states["plus"]], encoder, 0.8)
    given = {**FIELDS, "pag_scale": 3.0, **fields}
    generator = torch.Generator().manual_seed(SEED)
    theirs = other(PROMPT, ip_adapter_image=[PICTURE], generator=generator, **given).images[0]
    prompt = ImagePrompt(image=PICTURE, adapter="plus", scale=0.8)
    assert psnr(draw(pipeline, prompt, pag_scale=3.0, **fields), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, prompt, **fields), theirs) < SMALL_PICTURE_PSNR_DB - 10
    assert psnr(draw(pipeline, pag_scale=3.0, **fields), theirs) < SMALL_PICTURE_PSNR_DB - 10


def test_a_model_that_edits_sees_it_too(loaded):
    small, pipeline, states, encoder, _ = loaded("editing")
    kind, own = diffusers.StableDiffusionInstructPix2PixPipeline, drawing(PIXELS, PIXELS)
    other = seeing_pipeline(kind, small, [states["plus"]], encoder, 0.8)
    fields = {name: FIELDS[name] for name in ("negative_prompt", "num_inference_steps")}
    fields |= {"image": own, "guidance_scale": 6.0, "image_guidance_scale": 1.5}
    generator = torch.Generator().manual_seed(SEED)
    theirs = other(PROMPT, ip_adapter_image=[PICTURE], generator=generator, **fields).images[0]
    fields |= {"height": None, "width": None}
    prompt = ImagePrompt(image=PICTURE, adapter="plus", scale=0.8)
    assert psnr(draw(pipeline, prompt, **fields), theirs) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(pipeline, **fields), theirs) < SMALL_PICTURE_PSNR_DB - 10


def test_around_deep_features_it_still_counts(loaded, place):
    _, pipeline, *_ = loaded("sd1")
    trace_ip_graphs(pipeline.model, place / "graphs", ("step_shallow", "step_shallow_ip"))
    prompt = ImagePrompt(image=PICTURE, adapter="plus")
    fields = {"cache_interval": 2, "num_inference_steps": 4}
    calls = []
    shallow = pipeline.engine("step_shallow_ip")
    run = shallow.run
    shallow.run = lambda given: calls.append(given["ip_keys"].shape) or run(given)
    try:
        cached = draw(pipeline, prompt, **fields)
    finally:
        del shallow.run
    assert len(calls) == 2
    exact = draw(pipeline, prompt)
    assert psnr(cached, exact) > psnr(draw(pipeline, **fields), exact)


def test_the_command_line_and_the_same_picture_again(loaded, place, tmp_path, monkeypatch, capsys):
    *_, file = loaded("sd1")
    PICTURE.save(tmp_path / "fox.png")
    LEFT.save(tmp_path / "left.png")
    monkeypatch.chdir(file.parent)
    shared = ["--graphs", str(place / "graphs"), "--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--model", str(file), "--steps", "2", "--height", "64", "--width", "64"]
    seen = ["--image-prompt", f"{tmp_path / 'fox.png'}:0.8@0:0.5", "--ip-adapter", "sd1-plus.bin"]
    seen += ["--image-encoder", "image_encoder", "--image-prompt-mask", str(tmp_path / "left.png")]
    out = [str(tmp_path / name) for name in ("one.png", "again.png", "more.png", "plain.png")]
    assert main([*asked, *seen, *shared, "--seed", "1", "--out", out[0]]) == 0
    settings = read_settings(Path(out[0]))
    assert settings["image_prompts"] == ["fox.png:0.8@0:0.5"]
    assert settings["ip_adapters"] == ["sd1-plus.bin"]
    assert settings["image_prompt_masks"] == ["left.png"]
    names = {"fox.png", "sd1-plus.bin", "image_encoder", "left.png"}
    assert names <= settings["hashes"].keys()
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()
    more = ["--image-prompt-mask", "none", *shared, "--out", out[2]]
    assert main(["--again", out[0], *more]) == 0
    assert Path(out[0]).read_bytes() != Path(out[2]).read_bytes()
    assert main(["--again", out[2], *shared, "--out", out[1]]) == 0
    assert Path(out[1]).read_bytes() == Path(out[2]).read_bytes()
    capsys.readouterr()
    OTHER.save(tmp_path / "fox.png")
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert "fox.png is another image prompt than" in capsys.readouterr().err
    (tmp_path / "fox.png").unlink()
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 2
    message = capsys.readouterr().err
    assert "was drawn with the image prompt fox.png, which is neither" in message
    assert main([*asked, *seen[2:], *shared]) == 2
    assert "--ip-adapter came without --image-prompt" in capsys.readouterr().err


def test_openvino_draws_the_same(loaded, place):
    pytest.importorskip("openvino")
    _, pipeline, *_, file = loaded("sd1")
    trace_ip_graphs(pipeline.model, place / "graphs", ("step_shallow_ip",))
    prompt = ImagePrompt(image=PICTURE)
    adapters, pictures = {"plus": place / "sd1-plus.bin"}, []
    for backend in ("cpu", "openvino"):
        settings = BackendSettings(threads=1, backend=backend)
        given = {"settings": settings, "precision": "float32", "graphs": place / "graphs"}
        with Pipeline.load(file, ip_adapters=adapters, **given) as pipeline:
            pictures.append(draw(pipeline, prompt, num_inference_steps=2, cache_interval=2))
    assert psnr(*pictures) >= SMALL_PICTURE_PSNR_DB - 10


def test_on_and_off_and_in_other_scales_nothing_is_opened(loaded, monkeypatch):
    _, pipeline, *_ = loaded("sd1")

    def one(**fields):
        return ImagePrompt(**{"image": PICTURE, "adapter": "plus", **fields})

    plain, prompted = draw(pipeline), draw(pipeline, one())
    draw(pipeline, one(adapter="linear"))
    changes = changes_of_engines(pipeline, monkeypatch)
    assert same(draw(pipeline), plain)
    assert not same(draw(pipeline, one(scale=0.5)), prompted)
    assert not same(draw(pipeline, one(scale=(1.0, 0.0))), prompted)
    assert not same(draw(pipeline, one(end=0.5)), prompted)
    assert not same(draw(pipeline, one(mask=LEFT)), prompted)
    assert not same(draw(pipeline, one(image=OTHER)), prompted)
    assert not same(draw(pipeline, one(adapter="linear")), prompted)
    assert same(draw(pipeline, one(scale=0)), plain), "which is no image prompt at all"
    assert same(draw(pipeline, one()), prompted)
    assert not changes


def test_a_picture_is_encoded_once_as_long_as_its_prompt_lives(loaded, monkeypatch):
    _, pipeline, *_ = loaded("sd1")
    adapters, calls = pipeline.ip_adapters, []
    encode = type(adapters).keys_and_values

    def counted(self, name, pixels):
        calls.append(name)
        return encode(self, name, pixels)

    monkeypatch.setattr(type(adapters), "keys_and_values", counted)
    prompt = ImagePrompt(image=PICTURE, adapter="plus")
    first = draw(pipeline, prompt, num_images_per_prompt=2)
    known = len(calls)
    assert 1 <= known <= 2, "the picture, and perhaps no picture, which is kept longer"
    assert same(draw(pipeline, prompt), first)
    draw(pipeline, prompt, hires=Hires(scale=1.5, strength=0.5))
    assert len(calls) == known
    draw(pipeline, ImagePrompt(image=PICTURE, adapter="plus"))
    assert len(calls) == known + 1


def test_rows_of_one_call_are_what_they_are_alone(loaded):
    _, pipeline, *_ = loaded("sd1")
    a = ImagePrompt(image=PICTURE, adapter="linear")
    b = ImagePrompt(image=OTHER, adapter="linear", scale=0.4, mask=LEFT)
    late = ImagePrompt(image=OTHER, adapter="linear", start=0.5)
    fields = {**FIELDS, "sampler": "ddim"}
    lists = [(), (a,), (b,), (a, b), (late,)]
    requests = [
        Request(prompt=PROMPT, seed=seed, image_prompts=prompts, **fields)
        for seed, prompts in enumerate(lists)
    ]
    sizes = []
    run = pipeline.engine("step_ip").run
    pipeline.engine("step_ip").run = lambda given: sizes.append(len(given["noise"])) or run(given)
    try:
        together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=5)}
    finally:
        del pipeline.engine("step_ip").run
    assert sorted(sizes) == [1] * 4 + [3] * 4, "those with one picture share all calls"
    for index, prompts in enumerate(lists):
        assert same(together[index], draw(pipeline, *prompts, seed=index))


def test_every_variant_of_a_step_takes_it(loaded):
    """Seamless pictures and other guidance, alone and in rows, with a picture and without."""
    _, pipeline, *_ = loaded("sd1")
    prompt = ImagePrompt(image=PICTURE, adapter="linear")
    variants = (
        {"seamless": "x"},
        {"seamless": "both", "pag_scale": 2.0},
        {"apg": (0.0, 5.0, -0.5)},
        {"sampler": "euler_cfg_pp", "guidance_scale": 0.6},
        {"pag_scale": 2.0, "guidance_interval": (0.0, 0.5), "negative_scale": 2.0},
    )
    requests = [
        Request(**{"prompt": PROMPT, "seed": seed, "sampler": "ddim", **FIELDS, **fields, **seen})
        for seed, fields in enumerate(variants)
        for seen in ({"image_prompts": (prompt,)}, {})
    ]
    drawn = {each.request: each.image for each in pipeline.draw(requests, batch_size=4)}
    for seed, fields in enumerate(variants):
        alone = draw(pipeline, prompt, seed=seed, **fields)
        assert same(drawn[2 * seed], alone), fields
        assert same(drawn[2 * seed + 1], draw(pipeline, seed=seed, **fields)), fields
        assert psnr(drawn[2 * seed], drawn[2 * seed + 1]) < SMALL_PICTURE_PSNR_DB - 10, fields
        assert psnr(alone, draw(pipeline, prompt, seed=seed)) < SMALL_PICTURE_PSNR_DB - 10, fields


def test_a_plain_step_has_the_operations_that_it_had(loaded):
    """What pictures need is in graphs of their own: a plain run opens none of these."""
    small, pipeline, *_ = loaded("sd1")
    plain, prompted = (
        trace_once(part, small.configs["unet"], "float32").model for part in ("step", "step_ip")
    )
    inputs = {value.name for value in plain.graph.input}
    assert not any(name.startswith("ip_") for name in inputs)
    layers = len(pipeline.model.unet.cross_attentions())
    kinds = [node.op_type for node in plain.graph.node]
    more = [node.op_type for node in prompted.graph.node]
    assert more.count("Softmax") - kinds.count("Softmax") == layers
    assert more.count("Attention") == kinds.count("Attention")
    assert len(kinds) == 489


def test_what_cannot_be_is_one_sentence(loaded, place, tmp_path):
    _, pipeline, _, _, file = loaded("sd1")
    write_ip_adapter(small_ip_adapter(SMALL["xl"], "plus"), place / "other.bin")
    with pytest.raises(ModelError, match=r"another family: it makes tokens of the width 128"):
        pipeline.set_ip_adapters({"a": place / "other.bin"})
    with pytest.raises(ModelError, match="is a model or a UNet, which cannot be used as one"):
        pipeline.set_ip_adapters([file])
    with pytest.raises(ModelError, match="does not exist"):
        pipeline.set_ip_adapters("nowhere.bin", place / "image_encoder")
    small_encoder(projection_dim=32, hidden_size=96).save_pretrained(tmp_path)
    for kind, what in (("linear", "an embedding of the width 24"), ("plus", "tokens of the width")):
        with pytest.raises(ModelError, match=rf"reads {what}.* gives (32|96); give the encoder"):
            pipeline.set_ip_adapters([place / f"sd1-{kind}.bin"], tmp_path)
    alone = tmp_path / "adapter.bin"
    alone.write_bytes((place / "sd1-plus.bin").read_bytes())
    with pytest.raises(ModelError, match=r"not in image_encoder/ beside it; give .* --image-enc"):
        pipeline.set_ip_adapters(alone)
    with pytest.raises(ModelError, match="an image encoder is for 'b', which is no IP-Adapter"):
        pipeline.set_ip_adapters({"a": alone}, {"b": tmp_path})
    assert pipeline.ip_adapters.names == KINDS, "they stay"
    with pytest.raises(RequestError, match="is 'face', and loaded are 'linear', 'plus', 'full'"):
        draw(pipeline, ImagePrompt(image=PICTURE, adapter="face"))
    with pytest.raises(RequestError, match="is one of several, and loaded are"):
        draw(pipeline, ImagePrompt(image=PICTURE))
    settings = pipeline.engines.settings
    pipeline.engines.settings = BackendSettings(backend="tensorrt")
    try:
        with pytest.raises(BackendError, match="'tensorrt' runs no IP-Adapters yet"):
            pipeline.set_ip_adapters({"a": place / "sd1-plus.bin"})
    finally:
        pipeline.engines.settings = settings


def test_pictures_are_the_same_on_a_device(loaded):
    _, host, _, _, file = loaded("sd1")
    adapters = {kind: host.ip_adapters.path(kind) for kind in KINDS}
    folders = host.engines.folders
    pipeline = Pipeline.load(file, graphs=folders[0], settings=SETTINGS, ip_adapters=adapters)
    device = FakeDevice()
    moved(pipeline, device)
    prompts = [
        ImagePrompt(image=PICTURE, adapter="plus", scale=(1.0, 0.4)),
        ImagePrompt(image=OTHER, adapter="linear", mask=LEFT, end=0.7),
    ]
    expected = draw(host, *prompts)
    for _ in range(4):
        device.counts.clear()
        assert same(draw(pipeline, *prompts), expected)
    assert device.counts["replay"] == 1
