import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from engine.errors import RequestError
from runtime.conditioning.syntax import parse
from runtime.images.a1111 import (
    AUTOMATIC,
    NOISE_LABELS,
    PARAMETERS_KEY,
    SAMPLER_LABELS,
    SCHEDULE_LABELS,
    format_parameters,
    schedule_label,
)
from runtime.images.a1111_reader import parse_parameters
from runtime.images.files import SPACING_KEY, write_image
from runtime.images.upscaling import UPSCALERS
from runtime.noise import MAX_SEED, NOISES
from runtime.samplers import IN_LAMBDA, SAMPLERS, SCHEDULES, resolve
from runtime.samplers.noise_schedule import TIMESTEP_SPACINGS, NoiseSchedule
from runtime.samplers.program import Run
from runtime.samplers.sigma_schedules import levels

# Pieces that look like the syntax of the text, beside any characters.
LOOKALIKES = ["\n", "Negative prompt:", "Steps: 3, Sampler: Euler", ", ", ": ", '"', "\\", " ", "x"]
PROMPTS = st.lists(st.sampled_from(LOOKALIKES) | st.text(max_size=5), max_size=8).map("".join)
SETTINGS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "negative_prompt": PROMPTS,
        "sampler": st.sampled_from(sorted(SAMPLERS)),
        "schedule": st.none() | st.sampled_from(SCHEDULES),
        "seed": st.integers(0, MAX_SEED),
        "num_inference_steps": st.integers(1, 1000),
        "guidance_scale": st.floats(0, 1000),
        "height": st.integers(8, 8192),
        "width": st.integers(8, 8192),
        "clip_skip": st.sampled_from([1, 2]),
        "noise": st.sampled_from(sorted(NOISES)),
    },
    optional={
        "variation_seed": st.integers(0, MAX_SEED),
        "variation_strength": st.floats(0.01, 1),
        "hires": st.fixed_dictionaries(
            {
                "scale": st.floats(1, 8),
                "strength": st.floats(0, 1, exclude_min=True),
                "upscaler": st.sampled_from(UPSCALERS),
            },
            optional={"num_inference_steps": st.integers(1, 1000)},
        ),
    },
)
PLAIN = {
    "prompt": "a red apple",
    "negative_prompt": "blurry",
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "seed": 1,
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "height": 768,
    "width": 512,
    "clip_skip": 2,
    "noise": "cpu",
    "strength": 0.75,
}


def read_as_automatic1111(text: str) -> dict[str, str]:
    """Read a text by the rules that Automatic1111's parse_generation_parameters follows."""
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    *lines, last = text.strip().split("\n")
    fields, prompts, which = re.findall(pattern, last), ["", ""], 0
    assert len(fields) >= 3
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            line, which = line[16:].strip(), 1
        prompts[which] += "\n" + line if prompts[which] else line
    read = {"Prompt": prompts[0], "Negative prompt": prompts[1]}
    for name, value in fields:
        read[name] = json.loads(value) if value[:1] == value[-1:] == '"' else value
    return read


@given(SETTINGS)
def test_what_is_written_is_read(settings):
    assert parse_parameters(format_parameters(settings)) == settings


@given(SETTINGS)
def test_automatic1111_reads_what_is_written(settings):
    read = read_as_automatic1111(format_parameters(settings))
    assert read["Prompt"] == settings["prompt"]
    assert read["Negative prompt"] == settings["negative_prompt"]
    assert int(read["Seed"]) == settings["seed"]
    assert int(read["Steps"]) == settings["num_inference_steps"]
    assert float(read["CFG scale"]) == settings["guidance_scale"]
    assert read["Size"] == f"{settings['width']}x{settings['height']}"
    assert read["RNG"] in ("CPU", "NV")


@given(st.text() | PROMPTS)
def test_no_text_fails(text):
    assert isinstance(parse_parameters(text), dict)
    after = parse_parameters(f"{text}\nSteps: 5, Sampler: {text}, Seed: {text}, Size: {text}")
    assert isinstance(after, dict)


@pytest.mark.parametrize("text", ["a", ':"', "a, ", '"\\', "a:"])
def test_hostile_texts_are_read_in_one_pass(text):
    text *= 300_000  # reading each stretch from each of its letters would take half an hour
    parse_parameters(text)
    parse_parameters(f"{text}\n{text}Steps: 1, Seed: 2, {text}")


def test_a_text_of_ours():
    settings = {**PLAIN, "model": "models/v1.5, pruned.safetensors", "latentrt": "0.1.0"}
    assert format_parameters(settings) == (
        "a red apple\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, "
        'Size: 512x768, Model: "v1.5, pruned", Denoising strength: 0.75, Clip skip: 2, '
        "RNG: CPU, Version: latentrt 0.1.0"
    )
    read = parse_parameters(format_parameters(settings))
    assert read == PLAIN | {"model_name": "v1.5, pruned"}


def test_prompts_that_the_format_would_change_come_once_more():
    settings = {**PLAIN, "prompt": "a\nNegative prompt: b", "negative_prompt": ""}
    text = format_parameters(settings)
    assert text.endswith('Prompt: "a\\nNegative prompt: b", Negative prompt: ""')
    assert "Prompt: " not in format_parameters(PLAIN).replace("Negative prompt", "")
    assert parse_parameters(text) == settings


def test_other_names_of_a_sampler_are_written_as_one():
    text = format_parameters({"prompt": "a", "sampler": "dpmpp_2m_sde_gpu karras"})
    assert "Sampler: DPM++ 2M SDE, Schedule type: Karras" in text
    assert "Size" not in text
    with pytest.raises(RequestError, match="sampler is 'magic'"):
        format_parameters({"prompt": "a", "sampler": "magic"})


def test_plain_prompts_are_escaped():
    plain = {**PLAIN, "prompt": "f(x) = [x]", "prompt_syntax": False}
    read = parse_parameters(format_parameters(plain))
    assert [piece.text for [piece] in parse(read["prompt"])] == ["f(x) = [x]"]


def test_a_curve_of_guidance_is_left_out():
    assert "CFG scale" not in format_parameters({**PLAIN, "guidance_scale": [7.0, 3.0]})


@pytest.mark.parametrize("model", ["pictogram", "a/pictogram", "pictogram.ckpt", "b/pictogram/"])
def test_models_are_named_without_their_folder(model):
    assert parse_parameters(format_parameters({**PLAIN, "model": model}))["model_name"] == (
        "pictogram"
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_label_of_a_sampler_is_understood(sampler):
    label = SAMPLER_LABELS.get(sampler, sampler)
    assert resolve(label, None) == (sampler, None)
    assert resolve(f"{label} Karras", None) == (sampler, "karras")


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, *TIMESTEP_SPACINGS])
def test_every_schedule_that_is_written_is_read(sampler, schedule, spacing):
    settings = {"prompt": "a", "sampler": sampler, "schedule": schedule, "seed": 1}
    for steps in (20, 30):
        settings |= {"num_inference_steps": steps, "timestep_spacing": spacing}
        text = format_parameters({**settings, "latentrt": "0.1.0"})
        read = parse_parameters(text)
        assert (read["sampler"], read["schedule"]) == (sampler, schedule)
        label = read_as_automatic1111(text)["Schedule type"]
        assert label in {AUTOMATIC, *LEVELS, "Normal", "Beta", "Align Your Steps"}, "it is known"


@pytest.mark.parametrize("label", ["leading", "linspace", "kl_optimal", "Automatic", "Karras"])
def test_labels_of_older_files_of_ours_are_understood(label):
    text = f"a\nSteps: 1, Sampler: DPM++ 2M, Schedule type: {label}, Seed: 1, Version: latentrt"
    expected = {"Automatic": None, "Karras": "karras"}.get(label, label)
    assert parse_parameters(text)["schedule"] == expected


# Automatic1111's schedules as its modules/sd_schedulers.py has them, the last level being 0, on the
# table of Stable Diffusion.
NOISE = NoiseSchedule.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
)
TABLE = NOISE.sigmas(np.arange(1000.0))
HIGH, LOW = TABLE[-1], TABLE[0]


def at(timesteps):
    return np.exp(np.interp(timesteps, np.arange(1000), np.log(TABLE)))


LEVELS = {
    "Uniform": lambda n: at(np.linspace(999, 0, n)),
    "SGM Uniform": lambda n: at(np.linspace(999, 0, n + 1)[:-1]),
    "Simple": lambda n: TABLE[[-(1 + int(x * (1000 / n))) for x in range(n)]],
    "DDIM": lambda n: TABLE[np.arange(1, 1000, max(1000 // n, 1))][::-1],
    "Karras": lambda n: np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), n) ** 7,
    "Exponential": lambda n: np.exp(np.linspace(np.log(HIGH), np.log(LOW), n)),
    "KL Optimal": lambda n: np.tan(np.linspace(np.arctan(HIGH), np.arctan(LOW), n + 1))[:-1],
}
AUTOMATICALLY = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "Karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "Exponential"),
}
DISCARDS = ("dpm2", "dpm2_a", "dpmpp_3m_sde")  # the level before 0, after one step more
EVEN = ("Uniform", "SGM Uniform", "Simple", "DDIM", AUTOMATIC)
THEIRS = (*AUTOMATICALLY, "euler", "euler_a", "heun", "lms")


def its_levels(label, sampler, steps):
    label = AUTOMATICALLY.get(sampler, "Uniform") if label == AUTOMATIC else label
    return LEVELS[label](steps + 1)[:-1] if sampler in DISCARDS else LEVELS[label](steps)


def distance(ours, theirs):
    """The mean factor between levels; a run of other steps is another picture."""
    return np.inf if ours.shape != theirs.shape else np.abs(np.log(ours / theirs)).mean()


@pytest.mark.parametrize("steps", [8, 20, 25, 30, 37, 50])
@pytest.mark.parametrize("spacing", [None, *TIMESTEP_SPACINGS])
@pytest.mark.parametrize("sampler", THEIRS)
def test_the_label_is_of_the_levels_that_come_nearest(sampler, spacing, steps):
    whole = SAMPLERS[sampler] in IN_LAMBDA
    noise = replace(NOISE, timestep_spacing=spacing)
    run = Run(noise_schedule=noise, num_inference_steps=steps, first=0, schedule=None)
    ours = levels(run, whole=whole)[1][:-1]
    label = schedule_label(sampler, None, spacing, steps)
    chosen = distance(ours, its_levels(label, sampler, steps))
    if spacing == "leading" and not whole and sampler not in DISCARDS:
        assert label in ("DDIM",) if steps != 30 else ("Automatic", "Uniform"), "it would run 31"
        assert chosen < 1e-6 or steps == 30
    elif spacing == "trailing" or (spacing != "leading" and sampler not in ("dpm2", "dpm2_a")):
        assert chosen < 0.004
    if steps > 8:  # with few, no even spacing of its DPM2 comes near diffusers'
        best = min(distance(ours, its_levels(each, sampler, steps)) for each in EVEN)
        assert chosen < best + 0.015


def test_a_file_says_the_schedule_that_automatic1111_needs(tmp_path):
    image, settings = Image.new("RGB", (8, 8)), {"prompt": "a", "sampler": "dpmpp_2m"}
    settings |= {"schedule": None, "seed": 1, "num_inference_steps": 20}
    for spacing, label in ((None, "SGM Uniform"), ("trailing", "Simple")):
        image.info[SPACING_KEY] = spacing
        write_image(image, tmp_path / "a.png", settings)
        with Image.open(tmp_path / "a.png") as file:
            text = file.info[PARAMETERS_KEY]
        assert f"Schedule type: {label}" in text
        assert parse_parameters(text)["schedule"] is None


def test_the_size_is_that_of_the_first_run(tmp_path):
    """As Automatic1111 means it, which enlarges it again."""
    settings = {**PLAIN, "hires": {"scale": 2, "strength": 0.5, "upscaler": "lanczos"}}
    write_image(Image.new("RGB", (1024, 1536)), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as file:
        read = parse_parameters(file.info[PARAMETERS_KEY])
    assert (read["width"], read["height"]) == (512, 768)
    write_image(Image.new("RGB", (40, 24)), tmp_path / "b.png", {**settings, "height": None})
    with Image.open(tmp_path / "b.png") as file:
        assert "Size: 40x24" in file.info[PARAMETERS_KEY]


def test_labels_are_of_what_there_is():
    assert SAMPLER_LABELS.keys() <= SAMPLERS.keys()
    assert SCHEDULE_LABELS.keys() <= {None, *SCHEDULES}
    assert NOISE_LABELS.keys() == NOISES.keys()


# Texts of other programs


def test_a_text_of_automatic1111():
    text = (
        "masterpiece, (castle:1.2), by the sea <lora:ink:0.8>,\nsunset \n"
        "Negative prompt: blurry, low quality\nbad anatomy\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3412345678, "
        "Size: 640x512, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, "
        'VAE: vae-ft-mse.safetensors, Clip skip: 2, Lora hashes: "ink: 1c2d3e4f5a6b, x: 00", '
        'TI hashes: "bad: 12, worse: 34", Version: v1.10.1\n'
    )
    assert parse_parameters(text) == {
        "prompt": "masterpiece, (castle:1.2), by the sea <lora:ink:0.8>,\nsunset",
        "negative_prompt": "blurry, low quality\nbad anatomy",
        "num_inference_steps": 28,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 6.5,
        "seed": 3412345678,
        "width": 640,
        "height": 512,
        "clip_skip": 2,
        "noise": "cuda",
        "model_name": "v1-5-pruned-emaonly",
        "vae_name": "vae-ft-mse.safetensors",
        "left_out": {"LoRA": "ink", "Textual inversion": "bad: 12, worse: 34"},
    }


def test_a_text_of_an_older_automatic1111_without_negative_prompt():
    text = (
        "a cat\nSteps: 20, Sampler: DPM++ 2S a Karras, CFG scale: 7, Seed: 5, Size: 512x512, "
        "Model hash: 45dee52b, Denoising strength: 0.6, RNG: CPU"
    )
    read = parse_parameters(text)
    assert (read["prompt"], read["negative_prompt"]) == ("a cat", "")
    assert (read["sampler"], read["schedule"]) == ("dpmpp_2s_a", "karras")
    assert (read["strength"], read["clip_skip"], read["noise"]) == (0.6, 1, "cpu")


def test_a_text_of_forge_with_a_hires_fix():
    text = (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, "
        "CFG scale: 7, Seed: 5, Size: 512x512, Model: xl, Denoising strength: 0.7, RNG: NV, "
        'Hires prompt: "a cat, large", Hires upscale: 2, Hires upscaler: Latent, '
        "Version: f2.0.1v1.10.1-previous-665-gae278f79"
    )
    read = parse_parameters(text)
    assert "strength" not in read
    assert (read["prompt"], read["noise"]) == ("a cat", "cuda")


@pytest.mark.parametrize(
    ("written", "sampler", "schedule"),
    [
        ("Sampler: Euler a", "euler_a", "normal"),
        ("Sampler: Euler, Schedule type: Automatic", "euler", "normal"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpmpp_2m", "normal"),
        ("Sampler: DPM++ 2M", "dpmpp_2m", "normal"),
        ("Sampler: Euler, Schedule type: Uniform", "euler", "normal"),
        ("Sampler: DPM++ 2M, Schedule type: Normal", "dpmpp_2m", "normal"),
        ("Sampler: Euler, Schedule type: KL Optimal", "euler", "a1111_kl_optimal"),
        ("Sampler: Euler, Schedule type: Align Your Steps", "euler", "a1111_align_your_steps"),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform"),
        ("Sampler: Heun, Schedule type: DDIM", "heun", "leading"),
        ("Sampler: DPM2, Schedule type: Uniform", "dpm2", "sgm_uniform"),
        ("Sampler: DPM2 a, Schedule type: Automatic", "dpm2_a", "karras_discard"),
        ("Sampler: DPM2 Karras", "dpm2", "karras_discard"),
        ("Sampler: DPM2, Schedule type: Beta", "dpm2", "beta_discard"),
        ("Sampler: DPM2, Schedule type: KL Optimal", "dpm2", "a1111_kl_optimal_discard"),
        ("Sampler: DPM++ 3M SDE, Schedule type: Automatic", "dpmpp_3m_sde", "exponential_discard"),
        ("Sampler: DPM2, Schedule type: DDIM", "dpm2", "leading"),
        (
            "Sampler: Euler, Schedule type: Karras, Discard penultimate sigma: True",
            "euler",
            "karras_discard",
        ),
        ("Sampler: DPM++ 2M, Discard penultimate sigma: True", "dpmpp_2m", "sgm_uniform"),
        ("Sampler: DPM++ 3M SDE, Schedule type: Normal", "dpmpp_3m_sde", "sgm_uniform"),
        ("Sampler: Euler, Schedule type: Turbo", "euler", "trailing"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M Karras, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DDIM, Schedule type: Karras", "ddim", None),
        ("Sampler: UniPC", "unipc", None),
        ("Sampler: LCM, Schedule type: Automatic", "lcm", None),
        ("Sampler: LCM, Schedule type: Karras", "lcm", "karras"),
        ("Sampler: Restart, Schedule type: Karras", "Restart", "Karras"),
        ("Sampler: DPM++ 2M Karras, Schedule type: Beta", "DPM++ 2M Karras", "Beta"),
        ("Sampler: Euler, Schedule type: Polyexponential", "Euler", "Polyexponential"),
    ],
)
def test_samplers_of_automatic1111(written, sampler, schedule):
    read = parse_parameters(f"a cat\nSteps: 20, {written}, Seed: 5, Version: v1.10.1")
    assert (read["sampler"], read["schedule"]) == (sampler, schedule)


@pytest.mark.parametrize(
    ("sampler", "schedule", "labels"),
    [
        ("dpm2", "karras_discard", "Sampler: DPM2, Schedule type: Karras, CFG"),
        (
            "euler",
            "karras_discard",
            "Sampler: Euler, Schedule type: Karras, Discard penultimate sigma: True, CFG",
        ),
        ("dpm2_a", "karras", "Sampler: DPM2 a, Schedule type: Karras, CFG"),
    ],
)
def test_a_level_that_is_left_out_is_written_as_automatic1111_does(sampler, schedule, labels):
    text = format_parameters({**PLAIN, "sampler": sampler, "schedule": schedule, "latentrt": "1"})
    assert labels in text
    read = parse_parameters(text)
    assert (read["sampler"], read["schedule"]) == (sampler, schedule)
    assert "left_out" not in read
    theirs = parse_parameters(
        text.replace(", Schedule: karras_discard", "").replace("latentrt 1", "v1.10.1")
    )
    assert theirs["schedule"] == "karras_discard", "which Automatic1111 draws, DPM2 a's too"
    assert "left_out" not in theirs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a cat\nNegative prompt: dog",
        "a: 1, b: 2, c: 3",
        '{"sui_image_params": {"prompt": "a cat", "steps": 20, "seed": 5}}',
        "Steps: 20, Seed: 5",
    ],
)
def test_texts_that_are_no_parameters(text):
    assert parse_parameters(text) == {}


def test_fields_that_cannot_be_read_are_left_out():
    text = f"a\nSteps: many, CFG scale: , Seed: {'9' * 5000}, Size: 5x5x5, Clip skip: 2.5, RNG: ?"
    assert parse_parameters(text) == {
        "prompt": "a",
        "negative_prompt": "",
        "clip_skip": 1,
        "noise": "cuda",
    }
    quoted = parse_parameters('a\nSteps: 20, Seed: 5, Model: "a\\q", Sampler: "Euler a"')
    assert (quoted["model_name"], quoted["sampler"]) == ('"a\\q"', "euler_a")


@given(PROMPTS)
def test_a_png_holds_the_text(tmp_path_factory, prompt):
    settings = {**PLAIN, "prompt": prompt}
    path = tmp_path_factory.mktemp("png") / "apple.png"
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(PARAMETERS_KEY, format_parameters(settings))
    Image.new("RGB", (1, 1)).save(path, pnginfo=chunk)
    with Image.open(path) as file:
        assert parse_parameters(file.info[PARAMETERS_KEY]) == settings
