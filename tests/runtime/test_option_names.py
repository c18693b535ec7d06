"""A sentence names what was typed, an option, over all options of the commands that draw."""

import re
from pathlib import Path

import pytest
from PIL import Image

from engine.errors import RequestError
from latentrt.__main__ import main
from runtime import grid
from runtime.batch import __main__ as batch
from runtime.options import make_parser
from runtime.request import Request
from tests.support.pictures import drawing

# By the names of the fields: what no request can have.
WRONG = {
    **{"preset": "best", "sampler": "eulr", "schedule": "karas", "num_inference_steps": "0"},
    **{"cache_interval": "0", "seamless": "z", "deep_shrink": "2", "eta": "2", "height": "-8"},
    **{"width": "0", "seed": "-2", "variation_strength": "2", "variation_seed": "-3"},
    **{"noise": "gpu", "num_images_per_prompt": "0", "batch_size": "0", "guidance_scale": "-1"},
    **{"guidance_rescale": "2", "guidance_interval": "0.9:0.1", "negative_scale": "-1"},
    **{"pag_scale": "-1", "apg": "20:0:0", "clip_skip": "3", "strength": "2"},
    **{"image_noise": "x", "image_guidance_scale": "0", "inpaint_area": "all"},
    **{"mask_padding": "-1", "mask_blur": "-1", "hires_scale": "9", "hires_strength": "2"},
    **{"hires_num_inference_steps": "0", "hires_upscaler": "lancos", "threads": "0"},
    **{"prediction_type": "noise", "backend": "opnvino", "device": "GPU", "precision": "fp8"},
    **{"watermark": "too long", "c2pa_cert": "a.pem", "c2pa_key": "a.pem"},
    **{"control_images": "p.png", "control_modes": "loud", "control_preprocessors": "canny"},
    **{"control_types": "depth"},
    **{"ip_adapters": "a.bin", "image_encoders": "a", "image_prompt_masks": "p.png"},
    **{"image_prompts": "p.png", "build_missing": None},
}
# Of `draw` alone.
OUTPUT = {
    **{"preview_steps": "0", "preview_decoder": "own", "upsample_steps": "0"},
    **{"upsample_noise": "1", "upsample_seed": "1", "safety_action": "blur"},
}
# Of pictures to start from: what cannot act without another option, which is not given.
IDLE = {
    **{"strength": "0.5", "image_noise": "gaussian:0.1", "image_guidance_scale": "2"},
    **{"mask": "p.png", "inpaint_area": "masked", "mask_padding": "4", "mask_blur": "9"},
    **{"paste_back": None, "extend": "8,0,0,0", "hires_strength": "0.5"},
    **{"hires_num_inference_steps": "3", "hires_upscaler": "lanczos", "variation_seed": "3"},
}
OF_A_MASK = {name: IDLE[name] for name in ("inpaint_area", "mask_padding", "mask_blur")}
OF_A_MASK["paste_back"] = None
# What takes any text, is a file that is looked for, or is never wrong.
ANY = {"help", "negative_prompt", "expand", "out", "again", "animation", "upscale", "mark", "model"}
ANY |= {"safety_checker", "prompt_syntax", "clean_prompt", "regions", "loras", "lora_dir", "graphs"}
ANY |= {"wildcard_dir", "embeddings", "strict", "vae", "unet", "text_encoder", "text_encoder_2"}
ANY |= {"image", "controls", "upscaler_dir", *"xyz"}
ANY |= {"image_dir", "format", "ray", "actors"}  # of `batch`, which names them itself
COMMANDS = {
    "draw": (make_parser, ("draw", "a", "-o", "out.png")),
    "grid": (grid._parser, ("grid", "a", "--x", "prompt=a,b", "-o", "out.png")),
    "batch": (batch.make_parser, ("batch", "lines.txt", "-o", "out")),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("a\n")
    drawing(32, 32).save("p.png")
    return tmp_path


def actions(command):
    make, _ = COMMANDS[command]
    return {action.dest: action for action in make("x")._actions if action.option_strings}


def refused(capsys, command, name, value, *more):
    """Give a command an option that it must refuse; return the sentence, which names it."""
    option = next(o for o in actions(command)[name].option_strings if o.startswith("--"))
    words = [option] if value is None else [f"{option}={value}"]
    try:
        status = main([*COMMANDS[command][1], *more, *words])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert option in said
    unquoted = re.sub(r"'[^']*'", "", said)
    assert not re.findall(r"(?<![-\w])[a-z]+_[a-z_]+ (?:is|came|has)\b", unquoted), said
    assert {path.name for path in Path().iterdir()} == {"lines.txt", "p.png"}
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_looked_at(command):
    assert actions(command).keys() <= WRONG.keys() | IDLE.keys() | OUTPUT.keys() | ANY


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_wrong_is_named_as_it_was_typed(command, name, capsys):
    refused(capsys, command, name, WRONG[name])


@pytest.mark.parametrize("name", OUTPUT)
def test_what_is_written_wrongly_is_named_as_it_was_typed(name, capsys):
    more = ("--upsample", "missing.pth") if name == "upsample_steps" else ()
    refused(capsys, "draw", name, OUTPUT[name], *more)


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("command", ["draw", "grid"])
def test_an_option_that_cannot_act_is_refused(command, name, capsys):
    assert " came without --" in refused(capsys, command, name, IDLE[name])


@pytest.mark.parametrize("name", OF_A_MASK)
@pytest.mark.parametrize("command", ["draw", "grid"])
def test_an_option_of_a_mask_cannot_act_without_one(command, name, capsys):
    said = refused(capsys, command, name, OF_A_MASK[name], "--image", "p.png")
    assert " came without --mask; give both" in said


def test_padding_cannot_act_where_the_whole_picture_is_drawn(capsys):
    drawing(32, 32).convert("L").save("m.png")
    main(["a", "--image", "p.png", "--mask", "m.png", "--mask-padding", "4", "-o", "out.png"])
    said = capsys.readouterr().err
    assert said.startswith('error: --mask-padding came without --inpaint-area="masked"; give both')


@pytest.mark.parametrize("name", [name for name in IDLE if not name.startswith("hires")])
def test_a_field_that_cannot_act_is_refused_in_an_app(name):
    values = {
        **{"strength": 0.5, "image_noise": "gaussian:0.1", "image_guidance_scale": 2.0},
        **{"mask": Image.new("L", (8, 8)), "inpaint_area": "masked", "mask_padding": 4},
        **{"mask_blur": 9, "paste_back": False, "extend": (8, 0, 0, 0), "variation_seed": 3},
    }
    with pytest.raises(RequestError, match=f"^{name} came without"):
        Request(prompt="a", **{name: values[name]})
    if name in OF_A_MASK:
        with pytest.raises(RequestError, match=f"^{name} came without mask"):
            Request(prompt="a", image=drawing(32, 32), **{name: values[name]})
        more = {"inpaint_area": "masked"} if name == "mask_padding" else {}
        Request(
            prompt="a",
            image=drawing(32, 32),
            mask=Image.new("L", (32, 32), 255),
            **{**more, name: values[name]},
        )
