"""What a model predicts, in how many steps: each place that may say so, the most trusted first."""

import json
from pathlib import Path

import pytest

from engine.checkpoints.families import FAMILIES
from engine.checkpoints.prediction import Evidence, conclude
from engine.errors import ModelError

V, EPSILON = "v_prediction", "epsilon"
V_YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
"""


def concluded(name="model.safetensors", family="sd2", **known):
    evidence = Evidence(
        path=known.pop("folder", Path("/nowhere")) / name,
        metadata=known.pop("metadata", {}),
        names=known.pop("names", ()),
    )
    options = {"sees_picture": False, "time_condition": False, "compression": 8, "asked": None}
    return conclude(evidence, FAMILIES[family], **options | known)


def kind(conclusion):
    return conclusion.scheduler["prediction_type"]


def why(conclusion):
    return next(note for note in conclusion.notes if "prediction type" in note)


@pytest.mark.parametrize("asked", ["epsilon", "v_prediction", "sample"])
def test_what_is_asked_for_counts_first(asked):
    conclusion = concluded("768-v-ema.ckpt", metadata={"prediction_type": "v"}, asked=asked)
    assert kind(conclusion) == asked
    assert why(conclusion) == f"its prediction type is {asked}, as asked for"


@pytest.mark.parametrize("asked", ["v", "", "flow"])
def test_what_is_asked_for_is_checked(asked):
    with pytest.raises(ModelError, match="epsilon, v_prediction, sample are"):
        concluded(asked=asked)


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".yaml", V_YAML, V),
        (".yml", V_YAML, V),
        (".yaml", V_YAML.replace('"v"', "'v'  # velocity"), V),
        (".yaml", V_YAML.replace('"v"', "eps"), EPSILON),
        (".yaml", V_YAML.replace('"v"', "x0"), "sample"),
        (".yaml", V_YAML.replace("parameterization", "# nothing"), EPSILON),
        (".yaml", "target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling", V),
        (".yaml", "target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", EPSILON),
        (".json", json.dumps({"prediction_type": "v_prediction"}), V),
        (".json", json.dumps({"prediction_type": "epsilon"}), EPSILON),
    ],
)
def test_a_configuration_beside_the_file_counts(suffix, text, expected, tmp_path):
    (tmp_path / f"my model{suffix}").write_text(text)
    other = "epsilon" if expected == V else "v"
    conclusion = concluded(
        "my model.ckpt", folder=tmp_path, metadata={"modelspec.prediction_type": other}
    )
    assert kind(conclusion) == expected
    assert why(conclusion).endswith(f", from my model{suffix} beside the file")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".yaml", b""),
        (".yaml", b"name: other program's"),
        (".yaml", b"parameterization: unheard-of"),
        (".yaml", b"\xff\xfe\x00"),
        (".json", b"{"),
        (".json", b"[1]"),
        (".json", b'{"prediction_type": 4}'),
        (".json", b"[" * 100_000),
    ],
)
def test_a_configuration_that_says_nothing_is_passed_by(suffix, content, tmp_path):
    (tmp_path / f"model{suffix}").write_bytes(content)
    conclusion = concluded("model.ckpt", folder=tmp_path, names=("v_pred",))
    assert why(conclusion).endswith("from the tensor v_pred in the file")


def test_a_folder_beside_the_file_says_nothing(tmp_path):
    (tmp_path / "model.yaml").mkdir()
    assert "nothing says so" in why(concluded("model.ckpt", folder=tmp_path))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "epsilon"}, EPSILON),
        ({"modelspec.prediction_type": "v"}, V),
        ({"modelspec.predict_key": "v"}, V),
        ({"prediction_type": "V_Prediction"}, V),
        ({"ss_v_parameterization": "True"}, V),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, EPSILON),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, V),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, V),
    ],
)
def test_metadata_count_before_tensors_and_the_name(metadata, expected):
    name = "512-base.safetensors" if expected == V else "768-v.safetensors"
    conclusion = concluded(name, metadata=metadata)
    assert kind(conclusion) == expected
    assert f"from {next(iter(metadata))} in the file's metadata" in why(conclusion)


@pytest.mark.parametrize("metadata", [{"modelspec.prediction_type": "?"}, {"v_pred": "False"}])
def test_metadata_that_say_nothing_are_passed_by(metadata):
    assert "nothing says so" in why(concluded(metadata=metadata))


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("768-v-ema.ckpt", "sd2", V),
        ("v2-1_768-ema-pruned.safetensors", "sd2", V),
        ("v2-1_768-nonema-pruned.ckpt", "sd2", V),
        ("v2-1_512-ema-pruned.safetensors", "sd2", EPSILON),
        ("512-base-ema.ckpt", "sd2", EPSILON),
        ("my_base_model.ckpt", "sd2", EPSILON),
        ("noobaiXLNAIXL_vPred10Version.safetensors", "xl", V),
        ("model-v-pred.safetensors", "xl", V),
        ("anime_vpred.safetensors", "sd1", V),
        ("NoobAI-XL-eps-v1.1.safetensors", "xl", EPSILON),
        ("epsilon.safetensors", "sd2", EPSILON),
    ],
)
def test_the_name_tells(name, family, expected):
    conclusion = concluded(name, family)
    assert kind(conclusion) == expected
    assert why(conclusion).endswith("from the file's name")


@pytest.mark.parametrize(
    "name",
    ["deepvoid.ckpt", "reps.ckpt", "database.ckpt", "v1-5-pruned.ckpt", "1768.ckpt", "x.ckpt"],
)
def test_other_names_do_not_tell(name):
    assert "nothing says so, and the weights cannot" in why(concluded(name))


@pytest.mark.parametrize("family", ["sd1", "xl", "xl-refiner"])
def test_other_families_predict_noise_unless_something_is_said(family):
    conclusion = concluded("sd_xl_base_1.0_768.safetensors", family)
    assert kind(conclusion) == EPSILON
    assert why(conclusion).endswith("nothing says otherwise")


def test_stable_diffusion_2_for_inpainting_or_few_steps_predicts_noise():
    assert kind(concluded("inpainting.ckpt", sees_picture=True)) == EPSILON
    assert kind(concluded("sd_turbo.safetensors")) == EPSILON


def test_a_schedule_that_ends_in_noise_starts_at_its_end():
    for known in (
        {"names": ("v_pred", "ztsnr")},
        {"names": ("v_pred",), "metadata": {"ss_zero_terminal_snr": "True"}},
    ):
        conclusion = concluded(family="xl", **known)
        expected = {
            "prediction_type": V,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        assert conclusion.scheduler.items() >= expected.items()
        assert any("ends in pure noise" in note for note in conclusion.notes)
    assert "rescale_betas_zero_snr" not in concluded(family="xl", names=("v_pred",)).scheduler


@pytest.mark.parametrize(
    ("name", "metadata", "size"),
    [
        ("768-v.ckpt", {}, 96),
        ("512-base.ckpt", {}, 64),
        ("512-base.ckpt", {"modelspec.resolution": "768x768"}, 96),
        ("512-base.ckpt", {"modelspec.resolution": "640 x 1024"}, 128),
        ("512-base.ckpt", {"modelspec.resolution": "640"}, 80),
        ("512-base.ckpt", {"modelspec.resolution": "641x641"}, 64),
        ("512-base.ckpt", {"modelspec.resolution": "0x0"}, 64),
        ("512-base.ckpt", {"modelspec.resolution": "00"}, 64),
        ("512-base.ckpt", {"modelspec.resolution": "99999999x1"}, 64),
        ("512-base.ckpt", {"modelspec.resolution": "big"}, 64),
    ],
)
def test_the_size_in_training(name, metadata, size):
    conclusion = concluded(name, metadata=metadata)
    assert conclusion.sample_size == size
    said = any("pixels, from the metadata's modelspec.resolution" in n for n in conclusion.notes)
    assert said == (bool(metadata) and size != 64)


@pytest.mark.parametrize(
    ("name", "family", "variant", "steps", "method"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", "xl", "turbo", (1, 4), "EulerAncestralDiscrete"),
        ("sd_turbo.safetensors", "sd2", "turbo", (1, 4), "EulerDiscrete"),
        ("sdxl_lightning_4step.safetensors", "xl", "lightning", (4, 4), "EulerDiscrete"),
        ("sdxl_lightning_8step.safetensors", "xl", "lightning", (8, 8), "EulerDiscrete"),
        ("JuggernautXL-Lightning.safetensors", "xl", "lightning", (4, 8), "EulerDiscrete"),
        ("Hyper-SDXL-8steps.safetensors", "xl", "hyper", (8, 8), "DDIM"),
        ("realistic_hyper.safetensors", "sd1", "hyper", (4, 8), "DDIM"),
        ("LCM_Dreamshaper_v7_4k.safetensors", "sd1", "lcm", (4, 8), "LCM"),
        ("model_lcm_0-steps.safetensors", "sd1", "lcm", (4, 8), "LCM"),
        ("dreamshaperXL_lightningDPMSDE.safetensors", "xl", "lightning", (4, 8), "EulerDiscrete"),
        (
            "dreamshaperXL_v21TurboDPMSDE.safetensors",
            "xl",
            "turbo",
            (1, 4),
            "EulerAncestralDiscrete",
        ),
        ("realvisxlV50_v50LightningBakedvae.ckpt", "xl", "lightning", (4, 8), "EulerDiscrete"),
        ("juggernautXL_v9Rdphoto2Lightning.ckpt", "xl", "lightning", (4, 8), "EulerDiscrete"),
        ("realisticVisionV60B1_v51HyperVAE.ckpt", "sd1", "hyper", (4, 8), "DDIM"),
        ("NTRealXLHyper8step.safetensors", "xl", "hyper", (8, 8), "DDIM"),
        ("photonLCM_v10.safetensors", "sd1", "lcm", (4, 8), "LCM"),
        ("dmd2_sdxl_4step.safetensors", "xl", "dmd2", (4, 4), "LCM"),
        ("epicrealismXL_vxviLastfameDMD2.safetensors", "xl", "dmd2", (4, 4), "LCM"),
        ("model-TCD.safetensors", "xl", "tcd", (4, 8), "TCD"),
        ("wildcardxXLTURBOV10.safetensors", "xl", "turbo", (1, 4), "EulerAncestralDiscrete"),
        ("photoSDXLLIGHTNING_4step.safetensors", "xl", "lightning", (4, 4), "EulerDiscrete"),
        ("stableDiffusionXLLCM.safetensors", "xl", "lcm", (4, 8), "LCM"),
        ("someXLDMD2.safetensors", "xl", "dmd2", (4, 4), "LCM"),
    ],
)
def test_models_of_few_steps_are_known_by_name(name, family, variant, steps, method):
    conclusion = concluded(name, family)
    assert conclusion.variant.name == variant
    assert conclusion.variant.steps == steps
    assert conclusion.variant.guidance_scale == 1
    assert conclusion.scheduler["_class_name"] == f"{method}Scheduler"
    spacing = "leading" if variant in ("lcm", "tcd", "dmd2") else "trailing"
    assert conclusion.scheduler["timestep_spacing"] == spacing
    note = f"it is distilled to few steps ({variant}), from the file's name"
    assert conclusion.notes[0] == note
    assert kind(conclusion) == EPSILON


def test_models_of_few_steps_are_known_by_title():
    conclusion = concluded(family="xl", metadata={"modelspec.title": "SDXL Turbo"})
    assert conclusion.variant.name == "turbo"
    assert conclusion.sample_size == 64
    assert "modelspec.title" in conclusion.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        *("hyperrealism.ckpt", "turbocharged.ckpt", "enlightening.ckpt", "hyper_realistic_v3.ckpt"),
        *("hyperRealism_v2.ckpt", "Hyper-Detailed-Mix.ckpt", "dmd_v2.ckpt", "lcmachine.ckpt"),
        *("XLTURBOCHARGER.ckpt", "XLTURBOVISION.ckpt", "XLHYPERREAL.ckpt"),
        *("BlightningRod.ckpt", "ponyDiffusionV6XL_v6StartWithThisOne.safetensors"),
    ],
)
def test_names_that_only_sound_like_it(name):
    assert concluded(name, "xl").variant is None


def test_an_embedded_guidance_scale_is_a_consistency_model():
    conclusion = concluded("sd_turbo.ckpt", "sd1", time_condition=True)
    assert conclusion.variant.name == "lcm"
    assert conclusion.variant.guidance_scale == 8
    assert "cond_proj" in conclusion.notes[0]
