"""Perturbed attention, projected guidance and CFG++, beside diffusers and their papers."""

from functools import cache
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from engine.graphs.variants import Variant
from runtime import Pipeline, Request
from runtime.__main__ import main
from runtime.conditioning.guidance import Guidance
from runtime.images.files import read_settings
from runtime.samplers import program
from runtime.variants import fields_of_plan
from tests.support.pictures import drawing, psnr
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    PROMPT,
    SEED,
    SETTINGS,
    draw,
    reference_pipeline,
    write_small,
)
from tests.support.tolerances import LATENTS_ATOL, SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS
CFG_PP = ("ddim_cfg_pp", "euler_cfg_pp", "euler_a_cfg_pp", "dpmpp_2m_cfg_pp")


@pytest.fixture(scope="module")
def loaded(place):
    @cache
    def load(name):
        small, file, graphs = write_small(name, place)
        return small, Pipeline.load(file, graphs=graphs, settings=SETTINGS)

    return load


@pytest.fixture(scope="module")
def pictogram():
    return Pipeline.load(settings=SETTINGS, precision="float32")


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_perturbed_attention_is_diffusers_own(loaded, name):
    small, pipeline = loaded(name)
    kind = getattr(diffusers, f"{small.kind}PAGPipeline")
    theirs = reference_pipeline(kind, small, pag_applied_layers="mid")
    own = small.reference
    processors = own.unet.attn_processors
    try:
        for fields in ({"pag_scale": 3.0}, {"pag_scale": 1.5, "guidance_scale": 1.0}):
            generator = torch.Generator().manual_seed(SEED)
            picture = theirs(PROMPT, generator=generator, **{**FIELDS, **fields}).images[0]
            own.unet.set_attn_processor(dict(processors))
            assert psnr(draw(pipeline, **fields), picture) >= SMALL_PICTURE_PSNR_DB
            plain = {**fields, "pag_scale": None}
            assert psnr(draw(pipeline, **plain), picture) < SMALL_PICTURE_PSNR_DB / 2
    finally:
        own.unet.set_attn_processor(dict(processors))


def outputs_of(pipeline, state, inputs):
    """Return what the plain step gives for each group, (g, B, C, h, w), without guiding."""
    plain = dict(state.inputs(inputs))
    for name in ("perturbed", "update", "projection", "recalled", "directions"):
        plain.pop(name, None)
    registers = plain["registers"].shape[1]
    taken = np.zeros_like(plain["matrices"])
    taken[:, 0, registers] = 1
    weights, given = [], plain["guidance"]
    for group in range(len(given)):
        chosen = np.zeros_like(given)
        chosen[group] = 1
        run = pipeline.engine("step").run
        made = run({**plain, "guidance": chosen, "matrices": taken})
        weights.append(made["next_registers"][:, 0])
    return np.stack(weights).astype(np.float64)


def walked(pipeline, request, combine):
    """Walk a run by the plain step: combine(call, x, x0 of each group) -> guided x0, next x."""
    plan = pipeline.plan(request)
    state, x = pipeline.start(plan), None
    registers = state.registers[:, :1].astype(np.float64)
    x = registers[:, 0]
    program_ = plan.program
    for call, inputs in enumerate(plan.steps()):
        alpha, sigma = program_.signal_scales[call], program_.noise_scales[call]
        state.registers[:, 0] = x
        outputs = outputs_of(pipeline, state, inputs)
        x0s, epses = predicted(pipeline, x, outputs, alpha, sigma)
        ends = program_.signal_scales[call + 1], program_.noise_scales[call + 1]
        if request.sampler.startswith("ddim") and ends[1] == 0:  # it stops one timestep short
            signal = pipeline.schedule.alphas_cumprod[0]
            ends = np.sqrt(signal), np.sqrt(1 - signal)
        x = combine(call, x, x0s, epses, (alpha, sigma), ends)
    return x


def predicted(pipeline, x, outputs, alpha, sigma):
    """Return x0 and eps of each output, at whatever scale x is held."""
    norm = np.hypot(alpha, sigma)
    assert pipeline.schedule.prediction_type == "v_prediction"
    x0 = alpha / norm * x / norm - sigma / norm * outputs
    return x0, sigma / norm * x / norm + alpha / norm * outputs


def latents_of(pipeline, request):
    *_, last = pipeline.denoise(pipeline.plan(request))
    return last.latents


@pytest.mark.parametrize(
    "apg", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.25, 4.0, -0.5)]
)
def test_projected_guidance_is_the_papers(pictogram, apg):
    """Algorithm 1, with what diffusers' guider makes of predictions of x0."""
    fields = {**FIELDS, "guidance_scale": 9.0, "sampler": "ddim", "seed": SEED}
    eta, threshold, momentum = apg
    buffer = MomentumBuffer(momentum)

    def combine(call, x, x0s, epses, here, ends):
        (uncond, cond), (alpha, sigma) = x0s, here
        guided = normalized_guidance(
            *map(torch.from_numpy, (cond, uncond)),
            guidance_scale=fields["guidance_scale"] - 1,
            momentum_buffer=buffer,
            eta=eta,
            norm_threshold=threshold,
            use_original_formulation=True,
        ).numpy()
        return ends[0] * guided + ends[1] * (x - alpha * guided) / sigma

    expected = walked(pictogram, Request(prompt=PROMPT, **fields), combine)
    found = latents_of(pictogram, Request(prompt=PROMPT, apg=apg, **fields))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= LATENTS_ATOL * scale
    plain = latents_of(pictogram, Request(prompt=PROMPT, **fields))
    is_plain = np.abs(plain - expected).max() <= LATENTS_ATOL * scale
    assert is_plain == (apg == (1.0, 0.0, 0.0)), "which is guidance as it always is"


@pytest.mark.parametrize("sampler", ["ddim_cfg_pp", "euler_cfg_pp"])
@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0])
def test_cfg_pp_is_the_papers(pictogram, sampler, scale):
    """Algorithm 2: to the guided x0, and back along the unconditional eps."""
    fields = {**FIELDS, "guidance_scale": scale, "seed": SEED}

    def combine(call, x, x0s, epses, here, ends):
        (uncond, cond), (eps, _) = x0s, epses
        return ends[0] * (uncond + scale * (cond - uncond)) + ends[1] * eps

    request = Request(prompt=PROMPT, sampler=sampler, **fields)
    expected = walked(pictogram, request, combine)
    found = latents_of(pictogram, request)
    assert np.abs(found - expected).max() <= LATENTS_ATOL * np.abs(expected).max()
    plain = Request(prompt=PROMPT, sampler=sampler.removesuffix("_cfg_pp"), **fields)
    assert np.abs(latents_of(pictogram, plain) - expected).max() > 0.05 * np.abs(expected).max()


def test_dpmpp_2m_with_cfg_pp_is_comfyuis(pictogram):
    """As ComfyUI writes it, in sigma: its second difference is to the unconditional x0 before."""
    fields = {**FIELDS, "guidance_scale": 1.5, "seed": SEED, "num_inference_steps": 5}
    request = Request(prompt=PROMPT, sampler="dpmpp_2m_cfg_pp", **fields)
    sigmas, before = program("dpmpp_2m_cfg_pp", pictogram.schedule, 5).noise_scales, []

    def combine(call, x, x0s, epses, here, ends):
        (uncond, cond) = x0s
        guided = uncond + 1.5 * (cond - uncond)
        if ends[1] == 0:
            return guided
        e = np.exp(-np.log(sigmas[call] / sigmas[call + 1]))
        mix = -e * uncond
        if before:
            r = np.log(sigmas[call - 1] / sigmas[call]) / np.log(sigmas[call] / sigmas[call + 1])
            mix = mix - (e - 1) / (2 * r) * (guided - before[-1])
        before.append(uncond)
        return guided + mix + e * x

    expected = walked(pictogram, request, combine)
    found = latents_of(pictogram, request)
    assert np.abs(found - expected).max() <= LATENTS_ATOL * np.abs(expected).max()


def test_without_guidance_cfg_pp_is_the_sampler_itself(pictogram):
    """Where both outputs are one, by the same text on both sides."""
    for name in CFG_PP:
        fields = {**FIELDS, "negative_prompt": PROMPT, "seed": SEED}
        found = latents_of(pictogram, Request(prompt=PROMPT, sampler=name, **fields))
        plain = {"dpmpp_2m_cfg_pp": "euler"}.get(name, name.removesuffix("_cfg_pp"))
        if name == "dpmpp_2m_cfg_pp":
            fields["num_inference_steps"] = 1
            found = latents_of(pictogram, Request(prompt=PROMPT, sampler=name, **fields))
        expected = latents_of(pictogram, Request(prompt=PROMPT, sampler=plain, **fields))
        assert np.abs(found - expected).max() <= LATENTS_ATOL * np.abs(expected).max(), name


UNLIKE = (
    {},
    {"pag_scale": 3.0},
    {"pag_scale": 1.0, "sampler": "euler"},
    {"apg": (0.0, 5.0, -0.5), "guidance_scale": 9.0},
    {"apg": (0.5, 0.0, 0.0), "sampler": "dpmpp_2m"},
    {"sampler": "euler_cfg_pp", "guidance_scale": 0.6},
    {"sampler": "dpmpp_2m_cfg_pp", "guidance_scale": 1.5},
    {"sampler": "euler_a_cfg_pp", "guidance_scale": 1.5, "apg": (0.0, 3.0, 0.5)},
    {"pag_scale": 2.0, "apg": (0.0, 5.0, 0.0)},
    {"pag_scale": 2.0, "cache_interval": 2},
)


def test_rows_of_one_call_are_what_they_are_alone(pictogram):
    requests = [
        Request(**{"prompt": PROMPT, "seed": i, "sampler": "ddim", **FIELDS, **fields})
        for i, fields in enumerate(UNLIKE)
    ]
    together = {drawn.request: drawn.image for drawn in pictogram.draw(requests, batch_size=8)}
    alone = [draw(pictogram, seed=i, **fields) for i, fields in enumerate(UNLIKE)]
    for i, image in enumerate(alone):
        assert np.array_equal(together[i], image), UNLIKE[i]


def test_apg_and_cfg_pp_share_calls(pictogram):
    sizes, part = [], ("step", Variant(guided=True))
    run = pictogram.engine(*part).run
    requests = [
        Request(**{"prompt": PROMPT, "seed": i, "sampler": "ddim", **FIELDS, **UNLIKE[i]})
        for i in (3, 4, 5, 6, 7)
    ]
    pictogram.engine(*part).run = lambda given: sizes.append(len(given["noise"])) or run(given)
    try:
        list(pictogram.draw(requests, batch_size=5))
    finally:
        del pictogram.engine(*part).run
    assert sizes == [5] * 4


def test_other_modes(pictogram):
    image, half = drawing(64, 64), drawing(64, 64).convert("L").point(lambda v: 255 * (v > 99))
    for fields in UNLIKE[1::2]:
        painted = draw(pictogram, image=image, mask=half, mask_blur=0, **fields)
        kept = np.asarray(half) == 0
        assert np.array_equal(np.asarray(painted)[kept], np.asarray(image)[kept])
        assert draw(pictogram, image=image, strength=0.5, **fields).size == (64, 64)
    two = {"prompt": "a hat AND a cat :0.5", "negative_scale": 2.0, "seed": SEED}
    for fields in UNLIKE[1::2]:
        images = pictogram(**{**FIELDS, "sampler": "ddim", **two, **fields}).images
        assert np.asarray(images[0]).std() > 1


def test_outside_its_interval_nothing_is_perturbed(pictogram):
    none = draw(pictogram, pag_scale=3.0, guidance_interval=(0.0, 0.0))
    assert np.array_equal(none, draw(pictogram, guidance_interval=(0.0, 0.0)))
    calls = pictogram.plan(
        Request(prompt=PROMPT, pag_scale=3.0, guidance_interval=(0.0, 0.5), **FIELDS)
    ).conditioning
    assert [len(call["guidance"]) for call in calls] == [3, 3, 1, 1]
    for call in calls:
        assert np.allclose(call["guidance"].sum(0), 1)


@pytest.mark.parametrize("sampler", CFG_PP[1:])
def test_previews_are_what_was_guided(pictogram, sampler):
    plan = pictogram.plan(Request(prompt=PROMPT, sampler=sampler, seed=SEED, **FIELDS))
    seen = list(pictogram.denoise(plan))
    scale = np.abs(seen[-1].latents).max()
    assert np.abs(seen[-1].denoised() - seen[-1].latents).max() <= 1e-3 * scale
    assert not np.allclose(seen[0].denoised(), seen[0].latents, atol=0.1 * scale)


def test_what_cannot_be_is_one_sentence(pictogram):
    for value in ((0, 15), "0:15:0", 3.0, (0, 15, 2.0), (0, -1, 0)):
        with pytest.raises(RequestError, match="apg"):
            Request(prompt=PROMPT, apg=value)
    for fields in ({"guidance_scale": 1.0}, {"guidance_interval": (0.0, 0.0)}):
        with pytest.raises(RequestError, match="at this guidance scale nothing does"):
            pictogram.plan(Request(**{"prompt": PROMPT, **FIELDS, "apg": (0, 15, 0), **fields}))
    with pytest.raises(RequestError, match="pag_scale is -1; give a number from 0 to 1000"):
        Request(prompt=PROMPT, pag_scale=-1)
    for backend in ("tensorrt", "tensorrt_rtx"):
        pictogram.engines.settings = BackendSettings(backend=backend)
        try:
            for fields in UNLIKE[1:6]:
                with pytest.raises(RequestError, match=f"{backend} draws with plain graphs alone"):
                    pictogram.plan(Request(**{"prompt": PROMPT, **FIELDS, **fields}))
        finally:
            pictogram.engines.settings = SETTINGS


@pytest.mark.parametrize(
    ("told", "fields", "words"),
    [
        (0, {"pag_scale": 1.0}, "the attention of the UNet's middle, and that of lcm has none"),
        (256, {"apg": (0.0, 1.0, 0.0)}, "lcm is told its guidance .* which apg needs"),
        (256, {"sampler": "euler_cfg_pp"}, r"lcm is told its guidance .* which CFG\+\+ needs"),
    ],
)
def test_models_without_what_it_takes(pictogram, told, fields, words):
    unet = SimpleNamespace(time_cond_proj_dim=told, tensor_shapes=dict, block_out_channels=(8, 16))
    model = SimpleNamespace(path="lcm", unet=unet, is_editing=False)
    request = Request(prompt=PROMPT, **{"sampler": "ddim", **fields})
    plan = pictogram.plan(Request(prompt=PROMPT, sampler=request.sampler, **FIELDS))
    guidance = Guidance.over(5.0, 4)
    given = (guidance, plan.program, plan.conditioning, 1)
    with pytest.raises(RequestError, match=words):
        fields_of_plan(request, model, pictogram.schedule, *given)


def test_the_command_line_and_the_same_picture_again(tmp_path):
    shared = ["--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--steps", "2", "--height", "64", "--width", "64", "--seed", "1", *shared]
    cases = (
        (["--pag-scale", "3", "--apg", "0:15:-0.5"], {"pag_scale": 3.0, "apg": [0.0, 15.0, -0.5]}),
        (["--sampler", "Euler a CFG++"], {"guidance_scale": 0.6}),
    )
    for number, (options, kept) in enumerate(cases):
        first, again = (tmp_path / f"{number}-{name}.png" for name in ("one", "again"))
        assert main([*asked, *options, "--out", str(first)]) == 0
        settings = read_settings(first)
        assert {name: settings[name] for name in kept} == kept
        assert main(["--again", str(first), *shared, "--out", str(again)]) == 0
        assert first.read_bytes() == again.read_bytes()


def test_plain_steps_take_none_of_it(pictogram):
    plan = pictogram.plan(Request(prompt=PROMPT, seed=SEED, **FIELDS))
    assert not plan.variants
    assert not {"perturbed", "update"} & plan.conditioning[0].keys()
    given = pictogram.start(plan).inputs(plan.steps()[0])
    assert tuple(sorted(given)) == tuple(sorted(pictogram.engines.graph("step").inputs))
