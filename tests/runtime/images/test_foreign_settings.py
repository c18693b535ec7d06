"""Settings in and out of PNG, JPEG and WebP: ours, and those that other programs write."""

import json
import shutil
import subprocess
from random import Random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime.conditioning.alternatives import expand
from runtime.conditioning.syntax import parse
from runtime.images.exif import MOST, exif_bytes, texts_of
from runtime.images.files import encode_image, read_settings, write_image
from tests.support.pictures import drawing

OURS = {"prompt": "a (red:1.2) apple, née 苹果 🍎", "sampler": "ddim", "seed": 7, "latentrt": "1"}
A1111 = (
    "a castle, {prompt}\nNegative prompt: blurry\nSteps: 4, Sampler: DPM++ 2M, "
    "Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 128x96, Model: v1, "
)
COMFYUI = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            **{"seed": 5, "steps": 20, "cfg": 8.0, "denoise": 1.0, "model": ["10", 0]},
            **{"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras"},
            **{"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd/v1.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, [x]", "clip": ["11", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "ink.safetensors", "model": ["4", 0], "clip": ["4", 1]},
    },
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2}},
    "12": {"class_type": "PrimitiveNode", "inputs": {"value": "a castle"}},
}
FOOOCUS = {
    **{"prompt": "cat", "full_prompt": ["a cat", "cinematic"], "negative_prompt": ""},
    **{"full_negative_prompt": ["ugly", "blurry"], "steps": 30, "guidance_scale": 4.0},
    **{"resolution": "(1152, 896)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras"},
    **{"seed": "123456", "base_model": "juggernautXL", "styles": "['Fooocus V2']"},
    **{"loras": [["sd_xl_offset", 0.1, "ab"]], "sharpness": 2.0, "version": "Fooocus v2.5.5"},
    **{"clip_skip": 2, "refiner_model": "None", "vae": "Default (model)"},
}
INVOKEAI = {
    **{"generation_mode": "txt2img", "positive_prompt": "a cat", "negative_prompt": "dog"},
    **{"width": 512, "height": 640, "seed": 11, "rand_device": "cpu", "cfg_scale": 7.5},
    **{"steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 0, "controlnets": []},
    **{"model": {"name": "dreamshaper", "base": "sd-1"}, "seamless_x": True},
}


def with_texts(path, **texts):
    """Write a picture with texts as other programs do."""
    chunk = PngInfo()
    for name, text in texts.items():
        chunk.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
    return path


def with_comment(path, comment, tag=0x9286, *, in_first=False):
    """Write a JPEG or WebP with a tag of EXIF."""
    exif = Image.Exif()
    (exif if in_first else exif.get_ifd(0x8769))[tag] = comment
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
@pytest.mark.parametrize("mark", [True, False])
def test_every_format_keeps_ours(tmp_path, suffix, mark):
    path = tmp_path / f"a{suffix}"
    write_image(drawing(48, 64), path, OURS, mark=mark)
    assert read_settings(path) == OURS
    with Image.open(path) as file:
        parameters = texts_of(file)["parameters"]
        assert parameters.startswith(OURS["prompt"] + "\n")
        assert "Sampler: DDIM" in parameters
        assert "Size: 64x48" in parameters
        if suffix != ".png":
            comment = file.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + parameters.encode("utf-16-be")


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exiftool_reads_the_comment(tmp_path, suffix):
    write_image(drawing(48, 64), tmp_path / f"a{suffix}", OURS)
    command = ["exiftool", "-j", "-UserComment", "-DigitalSourceType", f"a{suffix}"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    (tags,) = json.loads(told.stdout)
    assert tags["UserComment"].startswith(OURS["prompt"])
    assert "trainedAlgorithmicMedia" in tags["DigitalSourceType"]


def test_what_a_jpeg_cannot_hold_is_left_out():
    """A picture is written whatever its prompt's length."""
    for length, kept in ((10, 2), (MOST // 3, 1), (2 * MOST, 0)):
        settings = {**OURS, "prompt": "x" * length}
        data = encode_image(drawing(32, 32), "JPEG", settings)
        assert (b"UNICODE\0" in data) + (b"latentrt\0{" in data) == kept
    assert exif_bytes("", "") == b""


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize(
    ("head", "coding"),
    [
        (b"UNICODE\0", "utf-16-be"),
        (b"UNICODE\0", "utf-16-le"),
        (b"UNICODE\0", "utf-16"),
        (b"ASCII\0\0\0", "utf-8"),
        (bytes(8), "utf-8"),
        (b"JIS\0\0\0\0\0", "shift_jis"),
        (b"", "utf-8"),
    ],
)
def test_comments_in_every_coding(tmp_path, suffix, head, coding):
    word = "林檎" if coding == "shift_jis" else "née"
    text = A1111.format(prompt=word) + "Version: v1.10.1"
    path = with_comment(tmp_path / f"a{suffix}", head + text.encode(coding))
    settings = read_settings(path)
    assert settings["prompt"] == f"a castle, {word}"
    assert (settings["sampler"], settings["schedule"]) == ("dpmpp_2m", "karras")
    assert (settings["seed"], settings["width"], settings["height"]) == (5, 128, 96)


def test_stable_diffusion_cpp(tmp_path):
    text = (
        "a fox\nNegative prompt: sky\nSteps: 30, CFG scale: 5.000000, Guidance: 3.500000, "
        "Eta: 0.000000, Seed: 19, Size: 512x512, Model: v1.safetensors, RNG: cuda, "
        "Sampler: {}, Version: stable-diffusion.cpp"
    )
    for sampler, expected in (
        ("euler_a", "euler_a"),
        ("dpm++2m karras", "dpmpp_2m"),
        ("euler discrete", "euler"),
        ("dpm++2mv2", "dpm++2mv2"),
    ):
        settings = read_settings(with_texts(tmp_path / "a.png", parameters=text.format(sampler)))
        assert settings["sampler"] == expected, "one that is not known here keeps its name"
        assert settings["model_name"] == "v1.safetensors"
        assert "left_out" not in settings
        data = text.format(sampler).encode()
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", comment=data)
        assert read_settings(tmp_path / "a.jpg") == settings


def test_civitai(tmp_path):
    text = (
        "a fox\nNegative prompt: sky\nSteps: 25, Sampler: Euler a, CFG scale: 4, Seed: 3, "
        "Size: 832x1216, Clip skip: 2, Created Date: 2026-01-01T01:02:03.4567890Z, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony"},'
        '{"type":"lora","weight":0.8,"modelName":"Ink, fine"}], Civitai metadata: {}'
    )
    settings = read_settings(
        with_comment(tmp_path / "a.jpg", b"UNICODE\0" + text.encode("utf-16-be"))
    )
    assert (settings["clip_skip"], settings["guidance_scale"]) == (2, 4)
    assert settings["model_name"] == "Pony"
    assert settings["left_out"] == {"Civitai resources": "Ink, fine"}


def test_comfyui(tmp_path):
    expected = {
        **{"prompt": "a castle", "negative_prompt": r"text, \[x\]", "noise": "cpu"},
        **{"seed": 5, "num_inference_steps": 20, "guidance_scale": 8.0, "clip_skip": 2},
        **{"sampler": "dpmpp_2m_sde", "schedule": "karras", "width": 512, "height": 768},
        **{"model_name": "sd/v1.safetensors", "left_out": {"node 10": "LoraLoader"}},
    }
    text = json.dumps(COMFYUI)
    assert read_settings(with_texts(tmp_path / "a.png", prompt=text, workflow="{}")) == expected
    path = with_comment(tmp_path / "a.webp", f"prompt:{text}", 0x0110, in_first=True)
    assert read_settings(path) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("dpm_2", "karras"), ("dpm2", "karras_discard")),
        (("dpm_2_ancestral", "normal"), ("dpm2_a", "sgm_uniform")),
        (("uni_pc", "exponential"), ("comfyui_uni_pc", "exponential_discard")),
        (("uni_pc_bh2", "simple"), ("comfyui_uni_pc_bh2", "simple_discard")),
        (("euler", "beta"), ("euler", "comfyui_beta")),
        (("dpm_2", "beta"), ("dpm2", "comfyui_beta_discard")),
        (("euler", "ddim_uniform"), ("euler", "leading")),
    ],
)
def test_names_that_mean_something_of_its_own_in_comfyui(tmp_path, names, expected):
    graph = json.loads(json.dumps(COMFYUI))
    (sampler,) = (n for n in graph.values() if n["class_type"] == "KSampler")
    sampler["inputs"] |= dict(zip(("sampler_name", "scheduler"), names, strict=True))
    settings = read_settings(with_texts(tmp_path / "a.png", prompt=json.dumps(graph)))
    assert (settings["sampler"], settings["schedule"]) == expected


def test_comfyui_from_a_picture(tmp_path):
    graph = {
        **COMFYUI,
        "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["4", 2]}},
        "20": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
    }
    graph["3"]["inputs"]["denoise"] = 0.6
    settings = read_settings(with_texts(tmp_path / "a.png", prompt=json.dumps(graph)))
    assert (settings["image"], settings["strength"]) == ("photo.png", 0.6)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_fooocus(tmp_path, suffix):
    path, text = tmp_path / f"a{suffix}", json.dumps(FOOOCUS)
    if suffix == ".png":
        with_texts(path, parameters=text, fooocus_scheme="fooocus")
    else:
        with_comment(path, text, in_first=True)
    assert read_settings(path) == {
        **{"prompt": "a cat, cinematic", "negative_prompt": "ugly, blurry", "noise": "cpu"},
        **{"num_inference_steps": 30, "guidance_scale": 4.0, "seed": 123456, "clip_skip": 2},
        **{"width": 1152, "height": 896, "model_name": "juggernautXL"},
        **{"sampler": "dpmpp_2m_sde", "schedule": "karras"},
        "left_out": {"loras": '[["sd_xl_offset", 0.1, "ab"]]', "sharpness": 2.0},
    }


def test_invokeai(tmp_path):
    path = with_texts(tmp_path / "a.png", invokeai_metadata=json.dumps(INVOKEAI))
    assert read_settings(path) == {
        **{"prompt": "a cat", "negative_prompt": "dog", "width": 512, "height": 640},
        **{"seed": 11, "noise": "cpu", "guidance_scale": 7.5, "num_inference_steps": 30},
        **{"sampler": "dpmpp_2m", "schedule": "karras", "clip_skip": 1},
        **{"model_name": "dreamshaper", "left_out": {"seamless_x": True}},
    }
    old = {
        "model_weights": "sd-1.4",
        "image": {"prompt": [{"prompt": "a cat", "weight": 1}], "steps": 9, "seed": 4}
        | {"sampler": "k_euler_a", "cfg_scale": 6, "width": 64, "height": 32, "threshold": 1},
    }
    settings = read_settings(with_texts(tmp_path / "b.png", **{"sd-metadata": json.dumps(old)}))
    assert (settings["prompt"], settings["sampler"]) == ("a cat", "euler_a")
    assert settings["negative_prompt"] == ""
    assert settings["left_out"] == {"threshold": 1}


@pytest.mark.parametrize(
    "text",
    [
        '"a cat [dog, blurry] on a mat" -s 9 -S 4 -W 64 -H 32 -C 6.5 -A k_euler_a -I in.png -f 0.4',
        '"a cat [dog, blurry] on a mat" -s9 -S4 -W64 -H32 -C6.5 -Ak_euler_a -Iin.png -f0.4',
    ],
)
def test_the_command_of_the_first_invokeai(tmp_path, text):
    assert read_settings(with_texts(tmp_path / "a.png", Dream=text)) == {
        **{"prompt": "a cat on a mat", "negative_prompt": "dog, blurry", "width": 64, "height": 32},
        **{"seed": 4, "noise": "cpu", "guidance_scale": 6.5, "num_inference_steps": 9},
        **{"sampler": "euler_a", "schedule": None, "clip_skip": 1, "strength": 0.4},
        "left_out": {"-I": "in.png"},
    }


@pytest.mark.parametrize("text", ["a cat", '"a cat', '"a" b', '"a" -s', '"a" -s x', "-" * 9, "'"])
def test_other_texts_by_the_name_dream_are_passed_over(tmp_path, text):
    assert read_settings(with_texts(tmp_path / "a.png", Dream=text)) is None


@pytest.mark.parametrize("name", ["parameters", "prompt", "invokeai_metadata", "sd-metadata"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "[" * 5000, '{"a": ' * 5000, "NaN", '{"prompt": 3}'),
        '{"prompt": {}, "base_model": [], "resolution": "(" }',
        '{"prompt": "a", "base_model": "b", "seed": [], "resolution": "9**9**9"}',
        '{"positive_prompt": 3, "clip_skip": "x"}',
        '{"image": {"prompt": [3]}}',
        '{"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "model": ["3"]}}}',
        '{"3": {"class_type": "KSampler", "inputs": {"seed": ["3", 0], "positive": [[]]}}}',
        '{"3": {"class_type": [], "inputs": {}}, "4": 3, "5": {"inputs": []}}',
    ],
    ids=lambda text: text[:20],
)
def test_texts_of_strangers_do_no_harm(tmp_path, name, text):
    settings = read_settings(with_texts(tmp_path / "a.png", **{name: text}))
    assert settings is None or isinstance(settings, dict)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"x" * 99])
def test_broken_exif(tmp_path, exif):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_settings(tmp_path / "a.jpg") is None


@pytest.mark.parametrize(
    ("theirs", "ours", "seen"),
    [
        ("a {red|blue} hat", r"a \{red|blue\} hat", "a {red|blue} hat"),
        ("{2$$a|b}, __c__", r"\{2$$a|b\}, \_\_c\_\_", "{2$$a|b}, __c__"),
        ("__a__b__", r"\_\_a\_\_b\_\_", "__a__b__"),
        (r"a \{x|y} (hat:1.2)", r"a \{x|y\} (hat:1.2)", "a {x|y} hat"),
        ("a {single} brace, snake_case", "a {single} brace, snake_case", None),
    ],
)
def test_alternatives_of_others_are_text(tmp_path, theirs, ours, seen):
    """Others keep the text that was chosen, so what is left of the notation was drawn."""
    text = f"{theirs}\nSteps: 4, Sampler: Euler, Seed: 1"
    assert read_settings(with_texts(tmp_path / "a.png", parameters=text))["prompt"] == ours
    assert expand(ours, Random(1), None) == (ours, [])
    pieces = [piece.text for chunk in parse(ours) for piece in chunk]
    assert "".join(pieces) == (seen or theirs)
    own = with_texts(tmp_path / "b.png", parameters=f"{text}, Version: latentrt 1")
    assert read_settings(own)["prompt"] == theirs


def test_a_text_of_comfyui_that_is_not_found_is_said(tmp_path):
    graph = json.loads(json.dumps(COMFYUI))
    graph["6"]["inputs"]["text"] = ["6", 0]
    found = read_settings(with_texts(tmp_path / "a.png", prompt=json.dumps(graph)))
    assert found["prompt"] == ""
    assert found["left_out"]["positive"] == "its text is not found"
    assert "negative" not in found["left_out"]


def test_styles_of_fooocus_that_are_in_no_text_are_said(tmp_path):
    short = {name: value for name, value in FOOOCUS.items() if not name.startswith("full_")}
    found = read_settings(with_texts(tmp_path / "a.png", parameters=json.dumps(short)))
    assert (found["prompt"], found["left_out"]["styles"]) == ("cat", "['Fooocus V2']")
