"""`latentrt info`: what a file is, a checkpoint, an adapter or a picture."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine.model import find_model
from latentrt.info import main
from runtime.images.files import write_image

SETTINGS = {"prompt": "a red apple", "sampler": "ddim", "seed": 7, "num_inference_steps": 3}


def facts(capsys, file):
    assert main([str(file), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture(tmp_path, capsys, suffix):
    path = tmp_path / f"apple{suffix}"
    write_image(Image.new("RGB", (40, 30)), path, SETTINGS)
    renamed = path.rename(tmp_path / "apple.safetensors")  # what counts is the content
    found = facts(capsys, renamed)
    assert (found["kind"], found["size"]) == ("picture", "40 × 30")
    assert found["settings"] == SETTINGS
    assert main([str(renamed)]) == 0
    assert "picture" in capsys.readouterr().out


def test_an_adapter_and_a_model(tmp_path, capsys):
    down, up = np.ones((4, 192), np.float32), np.ones((192, 4), np.float32)
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.png")
    assert facts(capsys, tmp_path / "a.png")["kind"] == "adapter"
    assert facts(capsys, find_model("pictogram"))["kind"] == "model"
    assert facts(capsys, "pictogram")["kind"] == "model"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"text"])
def test_what_is_neither_or_damaged_is_one_sentence(tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    assert main([str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_no_file(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert main(["x" * 5000]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
