"""Regions: each text in its area, as ComfyUI weighs masked conditionings, in every mode."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Hires, Pipeline, Request
from runtime.images.frame import Frame
from runtime.plan import StepInputs
from runtime.regions import Region, parse_region, shares_of
from runtime.samplers import SAMPLERS
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import BATCH_PSNR_DB, REGIONS_ATOL

SIDE, CELLS = 64, 8
WHITE = Image.new("L", (SIDE, SIDE), 255)


def columns(start, stop, level=255, width=SIDE, height=SIDE):
    """Paint some columns of a mask; start, stop: parts of its width."""
    mask = Image.new("L", (width, height))
    mask.paste(level, (int(start * width), 0, int(stop * width), height))
    return mask


LEFT, RIGHT = columns(0, 0.5), columns(0.5, 1)
RAMP = Image.fromarray(np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1)))
CAR, TREE = (
    Region(mask=LEFT, prompt="a red car"),
    Region(mask=columns(0.25, 1), prompt="a green tree"),
)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=BackendSettings(backend="cpu", threads=2), precision="float32")


def request(**chosen):
    given = {"prompt": "a house", "seed": 3, "num_inference_steps": 2, "height": SIDE}
    return Request(**{**given, "width": SIDE, "sampler": "ddim", **chosen})


def drawn(pipeline, **chosen):
    (image,) = pipeline(**fields_of(request(**chosen))).images
    return image


def fields_of(asked):
    names = (f for f in asked.__dataclass_fields__.values() if f.init)
    return {f.name: getattr(asked, f.name) for f in names}


def comfyui(outputs, masks, strengths):
    """Average outputs as ComfyUI's sampling does: each mask times its strength, over their sum."""
    total, counts = np.zeros_like(outputs[0]), np.full_like(outputs[0], 1e-37)
    for output, mask, strength in zip(outputs, masks, strengths, strict=True):
        total += output * mask * strength
        counts += np.broadcast_to(mask * strength, total.shape)
    return total / counts


@pytest.mark.parametrize(
    "regions",
    [
        [CAR],
        [CAR, TREE],
        [CAR, replace(TREE, weight=0.25), Region(mask=RAMP, prompt="the sky", weight=3.0)],
        [Region(mask=RAMP, prompt="the sky")],
        [Region(mask=columns(0, 1, 128), prompt="fog")],
        [Region(mask=WHITE, prompt="fog", weight=0.3), replace(CAR, weight=0.0)],
    ],
)
def test_shares_are_comfyuis_weighted_mean(regions):
    shares = shares_of(regions, None, SIDE, SIDE)
    masks = [np.asarray(r.mask.resize((CELLS,) * 2, Image.Resampling.BOX)) / 255 for r in regions]
    weights = [region.weight for region in regions]
    own = np.maximum(1 - sum(m * w for m, w in zip(masks, weights, strict=True)), 0)
    outputs = np.random.default_rng(0).standard_normal((len(regions) + 1, CELLS, CELLS))
    expected = comfyui(outputs, [*masks, own], [*weights, 1.0])
    np.testing.assert_allclose((shares * outputs).sum(0), expected, atol=0.01)
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-6)


def test_hard_masks_leave_nothing_of_the_prompt_and_soft_ones_their_part():
    left, right, own = shares_of([CAR, replace(TREE, mask=RIGHT)], None, SIDE, SIDE)
    assert not own.any()
    assert left.tolist() == [[1.0] * 4 + [0.0] * 4] * CELLS
    assert right.tolist() == [[0.0] * 4 + [1.0] * 4] * CELLS
    half, own = shares_of([replace(CAR, weight=0.5)], None, SIDE, SIDE)
    assert (half[:, :4] == 0.5).all()
    assert own.tolist() == [[0.5] * 4 + [1.0] * 4] * CELLS
    thin, own = shares_of([replace(CAR, mask=columns(0, 1 / 16))], None, SIDE, SIDE)
    assert thin[0].tolist() == [0.5] + [0.0] * 7, "half of a cell"


def output_of(pipeline, plan):
    """Return the guided output of a plan's first call, (C, h, w): the matrix takes nothing else."""
    state, inputs = pipeline.start(plan), plan.steps()[0]
    registers = state.registers.shape[1]
    matrices = np.zeros((1, registers, registers + 2), np.float32)
    matrices[:, 0, -2] = 1
    told = {**inputs.per_step, "matrices": matrices}
    step = StepInputs(
        conditioning=inputs.conditioning,
        per_step=told,
        is_full=True,
        signal_scale=inputs.signal_scale,
        noise_scale=inputs.noise_scale,
    )
    return pipeline.step(state, step).latents[0]


@pytest.mark.parametrize(
    ("prompt", "others"),
    [("a house", {}), ("a house AND a dog :0.5", {"negative_prompt": "red", "negative_scale": 2})],
)
def test_a_step_is_what_comfyui_makes_of_the_texts_one_by_one(pipeline, prompt, others):
    """The UNet is run on each text alone, and the outputs are put together here."""
    regions = [CAR, replace(TREE, weight=0.5), Region(mask=RAMP, prompt="a dog AND a hat :0.25")]

    def alone(text):
        return output_of(pipeline, pipeline.plan(request(prompt=text, guidance_scale=1.0)))

    shares = shares_of(regions, None, SIDE, SIDE)
    parts = {"a house": 1.0, "a dog": 0.5} if others else {"a house": 1.0}
    uncond = alone("")
    texts = [[("a red car", 1.0)], [("a green tree", 1.0)], [("a dog", 1.0), ("a hat", 0.25)]]
    texts.append(list(parts.items()))
    moved = sum(
        share * weight * (alone(text) - uncond)
        for share, pieces in zip(shares, texts, strict=True)
        for text, weight in pieces
    )
    expected = uncond + 4.0 * moved
    if others:
        expected += 2.0 * (uncond - alone("red"))
    plan = pipeline.plan(request(prompt=prompt, regions=regions, guidance_scale=4.0, **others))
    made = output_of(pipeline, plan)
    np.testing.assert_allclose(made, expected, atol=REGIONS_ATOL)
    plain = output_of(pipeline, pipeline.plan(request(prompt="a house", guidance_scale=4.0)))
    assert np.abs(made - plain).max() > 100 * REGIONS_ATOL


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_draws_a_text_that_is_everywhere_as_the_text_alone(pipeline, sampler):
    everywhere = [Region(mask=mask, prompt="a red car") for mask in (LEFT, RIGHT)]
    made = drawn(pipeline, sampler=sampler, regions=everywhere)
    assert psnr(made, drawn(pipeline, sampler=sampler, prompt="a red car")) > BATCH_PSNR_DB


def test_what_has_no_region_is_as_without_any(pipeline):
    plain = drawn(pipeline)
    assert drawn(pipeline, regions=[]) == plain
    assert drawn(pipeline, regions=[replace(CAR, weight=0.0)]) == plain
    assert drawn(pipeline, regions=[replace(CAR, prompt="a house")]) != drawn(
        pipeline, regions=[CAR]
    )


def test_a_text_acts_in_its_area(pipeline):
    """The first call's output is another where the mask is white, and only there."""
    plain = output_of(pipeline, pipeline.plan(request()))
    made = output_of(pipeline, pipeline.plan(request(regions=[CAR])))
    assert np.abs(made - plain)[..., :4].max() > 100 * REGIONS_ATOL
    np.testing.assert_allclose(made[..., 4:], plain[..., 4:], atol=REGIONS_ATOL)


def test_the_plain_step_takes_one_number_a_group(pipeline):
    plain, mapped = pipeline.plan(request()), pipeline.plan(request(regions=[CAR]))
    assert plain.conditioning[0]["guidance"].shape == (2, 1, 1, 1, 1)
    assert mapped.conditioning[0]["guidance"].shape == (3, 1, 1, CELLS, CELLS)
    engine, opened = pipeline.engine("step"), dict(pipeline.engines.opened)
    session = engine._session
    drawn(pipeline)
    drawn(pipeline, regions=[CAR, TREE])
    drawn(pipeline, regions=[replace(CAR, prompt="a blue boat")])
    assert pipeline.engines.opened == opened, "no other engine"
    assert pipeline.engine("step") is engine
    assert engine._session is session, "and no other session"


IMAGE = drawing(96, 128)
INPAINTED = {"image": IMAGE, "mask": columns(0.5, 1, width=128, height=96)}
MODES = {
    "image to image": {"image": IMAGE, "strength": 0.6},
    "inpainting": INPAINTED,
    "the masked part alone": {**INPAINTED, "inpaint_area": "masked", "height": 64, "width": 64},
    "outpainting": {"image": IMAGE, "extend": (0, 0, 32, 0)},
    "hires": {"hires": Hires(scale=1.5, num_inference_steps=2, upscaler="bilinear")},
    "deep features": {"cache_interval": 2, "num_inference_steps": 3},
    "guided for a while": {"guidance_interval": (0.0, 0.5), "guidance_scale": (7.0, 3.0)},
    "rescale": {"guidance_rescale": 0.7},
    "two pictures": {"num_images_per_prompt": 2},
    "words that change": {"prompt": "a [red|blue] house"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_regions(pipeline, mode):
    sides = {} if "image" in MODES[mode] else {"height": SIDE, "width": SIDE}
    asked = {**fields_of(request()), "height": None, "width": None, **sides, **MODES[mode]}
    plain = pipeline(**asked).images
    made = pipeline(**{**asked, "regions": [TREE]}).images
    assert [image.size for image in made] == [image.size for image in plain]
    assert all(a != b for a, b in zip(made, plain, strict=True))
    plan = pipeline.plan(Request(**{**asked, "regions": [CAR, TREE]}))
    for run in plan.runs():
        cells = run.height // 8, run.width // 8
        assert {call["guidance"].shape[2:] for call in run.conditioning} == {(1, *cells)}


def test_rows_with_and_without_regions_are_what_they_are_alone(pipeline):
    chosen = [{}, {"regions": [CAR]}, {"regions": [TREE]}, {"regions": [CAR, TREE]}, {}]
    asked = [request(sampler="euler_a", seed=i, **each) for i, each in enumerate(chosen)]
    together = {found.request: found.image for found in pipeline.draw(asked, batch_size=4)}
    for index, each in enumerate(asked):
        (alone,) = pipeline(**fields_of(each)).images
        assert together[index] == alone


def test_masks_lie_over_the_whole_picture_where_a_part_of_it_is_drawn():
    """The right half is drawn, of which the region covers the left half."""
    frame = Frame.masked(IMAGE, columns(0.5, 1, width=128, height=96), 96, 64, 0)
    assert frame.box == (64, 0, 128, 96)
    region = Region(mask=columns(0.25, 0.75, width=128, height=96), prompt="a")
    share, own = shares_of([region], frame, 96, 64)
    assert share.tolist() == [[1.0] * 4 + [0.0] * 4] * 12
    assert own.tolist() == [[0.0] * 4 + [1.0] * 4] * 12
    elsewhere, own = shares_of(
        [replace(region, mask=columns(0, 0.5, width=128, height=96))], frame, 96, 64
    )
    assert not elsewhere.any()
    assert (own == 1).all()


def test_openvino_compiles_once_more_and_draws_the_same(pipeline):
    pytest.importorskip("openvino")
    other = Pipeline.load(settings=BackendSettings(backend="openvino"), precision="float32")
    for regions in ([CAR], [CAR, TREE]):
        made = drawn(other, regions=regions)
        assert psnr(made, drawn(pipeline, regions=regions)) > 40


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_engines_of_tensorrt_take_none(pipeline, backend, monkeypatch):
    settings = replace(pipeline.engines.settings, backend=backend)
    monkeypatch.setattr(pipeline.engines, "settings", settings)
    with pytest.raises(RequestError, match=f"{backend}.* takes no regions .*; .* the backend cuda"):
        pipeline.plan(request(regions=[CAR]))


def many(count):
    return [Region(mask=LEFT, prompt=f"text {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region(mask="left.png", prompt="a"), "a region's mask came as str; give a PIL"),
        (lambda: Region(mask=LEFT, prompt=3), "a region's prompt came as int; give a text"),
        (lambda: Region(mask=LEFT, prompt="a", weight=-1), "a region's weight is -1; give a num"),
        (lambda: Region(mask=LEFT, prompt="a", weight=float("nan")), "weight is nan; give"),
        (lambda: Region(mask=columns(0, 0), prompt="fog"), "the region 'fog' is black everywhere"),
        (lambda: request(regions=CAR), "regions is no list of regions; give"),
        (lambda: request(regions=[(LEFT, "a")]), "regions is no list of regions"),
        (lambda: request(regions=many(16)), "16 regions came; up to 15"),
        (lambda: request(regions=[replace(CAR, prompt="a {red|blue} car")]), "has alternatives"),
        (lambda: request(regions=[replace(CAR, prompt="<lora:a:1>")]), "names an adapter"),
        (lambda: parse_region("nowhere.png:0.5", "a"), "the image nowhere.png cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_more_parts_than_can_be_drawn_together_are_refused(pipeline):
    regions = [replace(each, mask=columns(0, 1, 16)) for each in many(15)]
    with pytest.raises(RequestError, match="its regions have 17 parts; up to 16"):
        pipeline.plan(request(prompt="a AND b", regions=regions))
    pipeline.plan(request(regions=regions))


def test_texts_are_not_read_for_syntax_where_none_is(pipeline):
    region = replace(CAR, prompt="a {red|blue} <lora:car> AND")
    plan = pipeline.plan(request(regions=[region], prompt_syntax=False))
    assert len(plan.conditioning[0]["guidance"]) == 3
