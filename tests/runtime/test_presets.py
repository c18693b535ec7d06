from collections.abc import Mapping
from types import MappingProxyType

import pytest

from engine.checkpoints.families import FAMILIES
from engine.configs.diffusion import AutoencoderConfig, UNetConfig
from engine.errors import RequestError
from engine.model import Model, family_of, find_model
from runtime import Request
from runtime.presets import KINDS, PRESETS, Preset, describe_presets, preset
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.published_configs import UNET_REFINER, UNET_SD15, UNET_SD21, UNET_XL
from tests.support.small_models import CONSISTENCY, LEADING, SCHEDULE, TRAILING, V_PREDICTION

ZERO_SNR = V_PREDICTION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
EULER_A = {"_class_name": "EulerAncestralDiscreteScheduler"}
LCM = {"_class_name": "LCMScheduler"}
EULER = {"_class_name": "EulerDiscreteScheduler"}


def made(unet: Mapping[str, object], scheduler: Mapping[str, object], **facts: object) -> Model:
    """Make a model of its published configurations, without weights."""
    configs = {"unet": UNetConfig.from_dict(unet), "vae": AutoencoderConfig()}
    return Model(
        path=find_model("pictogram"),
        family=family_of(configs["unet"]),
        configs=MappingProxyType(configs),
        find=lambda name: pytest.fail(f"{name} is read"),
        scheduler=MappingProxyType(dict(scheduler)),
        sample_size=unet["sample_size"],
        **facts,
    )


ORDINARY = {
    "pictogram": Model.open(find_model("pictogram")),
    "sd1": made(UNET_SD15, SCHEDULE),
    "sd1 inpainting": made(UNET_SD15 | {"in_channels": 9}, SCHEDULE),
    "sd2 base": made(UNET_SD21 | {"sample_size": 64}, SCHEDULE),
    "sd2 768": made(UNET_SD21, V_PREDICTION),
    "xl": made(UNET_XL, LEADING | EULER),
    "xl zero SNR": made(UNET_XL, ZERO_SNR | EULER),
    "refiner": made(UNET_REFINER, LEADING | EULER),
}
DISTILLED = {
    "sd turbo": made(UNET_SD21, TRAILING | EULER),
    "xl turbo": made(UNET_XL | {"sample_size": 64}, TRAILING | EULER_A),
    "lightning": made(UNET_XL, TRAILING | EULER, steps=8, guidance_scale=1.0),
    "lcm": made(UNET_XL, CONSISTENCY | LCM),
    "lcm told its guidance": made(
        UNET_SD15 | {"time_cond_proj_dim": 256}, CONSISTENCY | LCM, guidance_scale=8.0
    ),
}
MODELS = ORDINARY | DISTILLED


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_preset_can_be_drawn_with(model, name):
    chosen = preset(name, MODELS[model])
    request = Request(
        prompt="an owl",
        num_inference_steps=chosen.num_inference_steps,
        guidance_scale=chosen.guidance_scale,
        sampler=chosen.sampler,
        schedule=chosen.schedule,
        height=chosen.size,
        width=chosen.size,
    )
    own = MODELS[model].sample_size * 8
    assert all(0 < side <= own for side in request.size((own, own), 8))
    steps = program(
        request.sampler,
        NoiseSchedule.from_config(MODELS[model].scheduler),
        chosen.num_inference_steps,
        schedule=request.schedule,
    )
    assert len(steps.timesteps) == chosen.num_inference_steps  # one call of the UNet a step
    assert 0 <= chosen.guidance_rescale <= 1


@pytest.mark.parametrize("model", ORDINARY)
def test_presets_differ_as_their_names_say(model):
    fast, balanced, quality, creative = (preset(name, ORDINARY[model]) for name in PRESETS)
    assert fast.num_inference_steps < balanced.num_inference_steps < quality.num_inference_steps
    assert fast.sampler == balanced.sampler == quality.sampler
    assert creative.guidance_scale < balanced.guidance_scale
    assert {fast.guidance_scale, quality.guidance_scale} == {balanced.guidance_scale}
    schedule = NoiseSchedule.from_config(ORDINARY[model].scheduler)
    draws = [
        program(each.sampler, schedule, 5, schedule=each.schedule).needs_noise.any()
        for each in (fast, balanced, quality, creative)
    ]
    assert draws == [False, False, False, True]


@pytest.mark.parametrize("model", DISTILLED)
def test_a_distilled_model_keeps_to_what_it_was_made_for(model):
    told = DISTILLED[model].guidance_scale or 1.0
    for name in PRESETS:
        chosen = preset(name, DISTILLED[model])
        assert 1 <= chosen.num_inference_steps <= 8
        assert (chosen.guidance_scale, chosen.size, chosen.schedule) == (told, None, None)


@pytest.mark.parametrize(
    ("model", "steps", "sampler"),
    [
        ("sd turbo", (4, 4), "euler"),
        ("xl turbo", (2, 4), "euler_a"),
        ("lightning", (8, 8), "euler"),
        ("lcm", (4, 8), "lcm"),
        ("lcm told its guidance", (4, 8), "lcm"),
    ],
)
def test_steps_of_distilled_models(model, steps, sampler):
    fast, balanced = preset("fast", DISTILLED[model]), preset("balanced", DISTILLED[model])
    assert (fast.num_inference_steps, balanced.num_inference_steps) == steps
    assert fast.sampler == balanced.sampler == sampler
    assert preset("quality", DISTILLED[model]) == preset("creative", DISTILLED[model]) == balanced


VARIANTS = {f"{v.name}-{name}": (name, v) for name in FAMILIES for v in FAMILIES[name].variants}


@pytest.mark.parametrize(("family", "variant"), VARIANTS.values(), ids=VARIANTS)
def test_variants_that_a_file_names(family, variant):
    """Whatever a file's name says, its presets stay within the steps that its authors name."""
    unet = UNET_XL if family == "xl" else UNET_SD15
    low, high = variant.steps
    for steps in {high, low}:
        model = made(
            unet,
            SCHEDULE | variant.scheduler,
            steps=steps,
            guidance_scale=variant.guidance_scale,
        )
        for name in PRESETS:
            chosen = preset(name, model)
            assert max(steps // 2, 1) <= chosen.num_inference_steps <= steps
            assert chosen.guidance_scale == variant.guidance_scale


def test_an_unknown_scheduler_of_a_distilled_model_is_eulers():
    model = made(UNET_XL, TRAILING | {"_class_name": "SomeOtherScheduler"}, steps=4)
    assert preset("fast", model) == preset("quality", model)
    assert preset("fast", model).sampler == "euler"


def test_models_are_told_apart():
    assert preset("fast", ORDINARY["pictogram"]) == KINDS["pictogram"][0]
    assert preset("fast", ORDINARY["sd1"]).schedule == "align_your_steps"
    assert preset("fast", ORDINARY["sd1 inpainting"]) == preset("fast", ORDINARY["sd2 base"])
    assert preset("fast", ORDINARY["sd2 768"]).schedule == "karras"
    assert preset("fast", ORDINARY["xl"]).schedule == "align_your_steps_xl"
    assert preset("fast", ORDINARY["refiner"]) != preset("fast", ORDINARY["xl"])


@pytest.mark.parametrize("name", PRESETS)
def test_zero_snr_starts_in_pure_noise_and_rescales_guidance(name):
    chosen, usual = preset(name, ORDINARY["xl zero SNR"]), preset(name, ORDINARY["xl"])
    assert (chosen.schedule, chosen.guidance_rescale) == ("trailing", 0.7)
    assert (chosen.sampler, chosen.guidance_scale) == (usual.sampler, usual.guidance_scale)
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    assert program(chosen.sampler, schedule, 10, schedule=chosen.schedule).timesteps[0] == 999


@pytest.mark.parametrize("name", ["best", "", "Fast", None, ["fast"]])
def test_an_unknown_preset(name):
    with pytest.raises(
        RequestError, match=r"(choose one of|There are) fast, balanced, quality, creative"
    ):
        preset(name, ORDINARY["pictogram"])


def test_help_lists_every_preset_of_every_kind():
    lines = describe_presets().splitlines()
    assert len(lines) == len(PRESETS) * (1 + len(KINDS)) + 1
    assert "  pictogram: 20 × dpmpp_2m, guidance 5" in lines
    assert max(map(len, lines)) < 80
    for name in PRESETS:
        assert any(line.startswith(f"{name}: ") for line in lines)


def test_a_preset_is_frozen():
    with pytest.raises(AttributeError):
        Preset(num_inference_steps=1, guidance_scale=1.0, sampler="euler").size = 8
