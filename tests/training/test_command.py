"""The whole pipeline, data to shipped model, on four pictures and a few steps."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import INTERRUPTED, USER_ERROR
from training import __main__ as command
from training import finish_command, ship, text_commands
from training.__main__ import main
from training.pictograms import STYLES, Pictograms

STEPS = ["--steps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (48, 32), colour).save(folder / f"{colour}.png")
        images.append({"id": index, "file_name": f"{colour}.png"})
        annotations.append({"image_id": index, "caption": f"a {colour} square"})
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture(scope="module")
def shipped(coco, tmp_path_factory):
    """Run all commands; return the working folder and the model's folder."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            text_commands, "download_merges", lambda folder: [("r", "e"), ("re", "d</w>")]
        )
        for arguments in (
            ["data", "--coco", str(coco), "--images", str(coco.parent)],
            ["autoencoder", *STEPS],
            ["diffusion", *STEPS, "--vocab-size", "516", "--seed", "3"],
            ["ship", "--out", str(out)],
            ["preview", *STEPS, "--model", str(out), "--out", str(out)],
        ):
            assert main([*arguments, "--work", str(work)]) == 0
    return work, out


def test_all_goes_on_where_it_was_stopped(shipped, tmp_path, capsys):
    work, _ = shipped
    names = ("data", "autoencoder-final.pt", "autoencoder.json", "tokenizer")
    for name in names:
        copy = shutil.copytree if (work / name).is_dir() else shutil.copy
        copy(work / name, tmp_path / name)
    asked = ["--minutes", "0.001", "--vocab-size", "516", "--out", str(tmp_path / "model")]
    assert main(["all", *asked, "--work", str(tmp_path)]) == 0
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "autoencoder --steps 2 --batch-size 2" in card
    assert "diffusion --steps 100000 --minutes 0.0007 --batch-size 48" in card


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_diffusers_loads_what_was_shipped(shipped):
    from diffusers import StableDiffusionPipeline

    work, out = shipped
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("a red square", num_inference_steps=2, output_type="np")
    assert result.images.shape == (1, 128, 128, 3)
    assert np.isfinite(result.images).all()
    trained = torch.load(work / "diffusion-final.pt", weights_only=True)
    name = "time_embedding.linear_1.weight"
    loaded = pipeline.unet.state_dict()[name]
    torch.testing.assert_close(loaded, trained[f"unet.{name}"].half().float(), rtol=0, atol=0)


def test_the_working_folder_holds_what_is_named(shipped):
    work, _ = shipped
    names = {path.name for path in work.iterdir()}
    assert names == {
        "autoencoder-final.pt",
        "autoencoder.json",
        "autoencoder.pt",
        "data",
        "diffusion-final.pt",
        "diffusion.json",
        "diffusion.pt",
        "latents.npy",
        "preview.pt",
        "tokenizer",
    }


def test_the_card_says_what_was_run(shipped):
    _, out = shipped
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# tiny\n")
    assert "python -m training diffusion --steps 2 --batch-size 2" in card
    assert "--seed 3 --vocab-size 516" in card
    assert "- diffusion: 2 steps, 0 minutes of computing; seed 3." in card
    assert "reconstructions of 4 pictures" in card
    assert "twemoji" not in card + (out / "NOTICE").read_text(encoding="utf-8")


def test_another_evaluation_than_of_pictograms_is_refused(shipped, capsys):
    work, out = shipped
    assert main(["evaluate", "--work", str(work), "--model", str(out)]) == USER_ERROR
    assert "captioned pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["autoencoder"], "python -m training data"),
        (["diffusion"], "python -m training data"),
        (["ship", "--out", "model"], "python -m training diffusion"),
        (["preview", "--out", "model"], "python -m training data"),
        (["finish", "--out", "model"], "python -m training data"),
        (["data", "--coco", "captions.json"], "give --images"),
        (["autoencoder", "--steps", "0"], "python -m training data"),
    ],
)
def test_commands_out_of_order_say_what_to_run(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--work", str(tmp_path)]) == USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_key_press_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_training_set", interrupted)
    assert main(["autoencoder", "--work", str(tmp_path)]) == INTERRUPTED
    assert "the last checkpoint is kept" in capsys.readouterr().err


def test_a_lora_of_few_steps_is_made_from_any_model(shipped, tmp_path):
    work, out = shipped
    lora = tmp_path / "few-steps.safetensors"
    asked = [*STEPS, "--pictures", "2", "--model", str(out), "--out", str(lora)]
    shutil.copytree(work / "data", tmp_path / "data")
    assert main(["few-steps", *asked, "--work", str(tmp_path)]) == 0
    assert 0 < lora.stat().st_size <= 2_000_000


def test_a_decoder_is_finished_for_any_model_of_pictograms(shipped, tmp_path, monkeypatch, capsys):
    _, out = shipped
    rng = np.random.default_rng(0)
    Pictograms(
        names=("owl", "fish"),
        keywords=(("bird",), ()),
        images=rng.integers(0, 256, (2, len(STYLES), 128, 128, 3), np.uint8),
        held_out=np.eye(2, len(STYLES), dtype=bool),
        everyday=np.ones(2, bool),
    ).save(tmp_path / "data.npz")
    few = dataclasses.replace(finish_command.CLASSIFIER, steps=1, batch_size=2)
    monkeypatch.setattr(finish_command, "CLASSIFIER", few)
    monkeypatch.setattr(finish_command.MobileNet, "load", lambda folder: lambda images: [images])
    model, finished = tmp_path / "model", tmp_path / "finished"
    asked = [*STEPS, "--model", str(out), "--out", str(finished), "--work", str(tmp_path)]
    assert main(["finish", *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held_out"] == 2
    assert told["psnr"][0] != told["psnr"][1]
    shutil.copytree(out, model)
    shutil.copytree(finished / "vae", model / "vae", dirs_exist_ok=True)
    _, before = ship.read_model(out)
    _, after = ship.read_model(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.partition(".")[0] for name in changed} == {"decoder", "post_quant_conv"}


def test_only_pictograms_are_finished(shipped, tmp_path, capsys):
    work, out = shipped
    asked = ["--model", str(out), "--out", str(tmp_path), "--work", str(work)]
    assert main(["finish", *STEPS, *asked]) == USER_ERROR
    assert "learns from pictograms" in capsys.readouterr().err
