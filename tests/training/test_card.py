import json

import numpy as np
import pytest
import torch

from training.card import write_card
from training.packages import PACKAGES

SHARES = {"pictures": 240, "top_1": 0.5, "top_5": 0.75}
QUALITY = {
    "settings": {"num_inference_steps": 20, "sampler": "ddim"},
    "held_out": SHARES,
    "trained": {**SHARES, "top_1": 0.625},
}


@pytest.fixture
def work(tmp_path):
    """Make the working folder of a training on pictograms, not yet measured."""
    folder = tmp_path / "work"
    folder.mkdir()
    held_out = np.zeros((500, 4), bool)
    held_out[:240, 1] = True
    np.savez(folder / "data.npz", held_out=held_out, everyday=np.ones(500, bool))
    torch.save({"seconds": 1380.0, "step": 3915}, folder / "autoencoder.pt")
    torch.save({"seconds": 5400.0, "step": 9000}, folder / "diffusion.pt")
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "pictogram"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(3_000_000))
    return folder


def read_card(out, work):
    write_card(out, work)
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_names_data_size_and_time(out, work):
    card = read_card(out, work)
    assert "# pictogram\n" in card
    assert "3 MB of float16 weights" in card
    assert "500 subjects, each drawn in 4 styles; 240 of the 2000 pictures are held out" in card
    assert "- autoencoder: 3,915 steps, 23 minutes of computing; its options" in card
    assert "\npython -m training data\n" in card
    assert "- diffusion: 9,000 steps, 90 minutes of computing; its options were not" in card
    for package in PACKAGES:
        assert f"{package.name} {package.version} | {package.licence} | {package.author}" in card


def test_the_card_tells_of_subjects_that_are_not_everyday(out, work):
    with np.load(work / "data.npz") as arrays:
        held_out = arrays["held_out"]
    np.savez(work / "data.npz", held_out=held_out, everyday=np.arange(500) < 200)
    card = read_card(out, work)
    assert "200 subjects are everyday ones and have 70% of the draws." in card
    assert "\npython -m training data --all\n" in card


def test_the_card_tells_the_options_that_were_used(out, work):
    options = {"steps": 10, "minutes": 86.0, "batch_size": 48, "seed": 5}
    (work / "diffusion.json").write_text(json.dumps({"options": options}))
    card = read_card(out, work)
    assert "python -m training diffusion --steps 10 --minutes 86.0 --batch-size 48 --seed 5" in card
    assert "minutes of computing; seed 5.\n" in card


def test_a_note_tells_what_the_command_does_not(out, work):
    record = {"options": {"seed": 5}, "note": "It started from the weights of a shorter training."}
    (work / "diffusion.json").write_text(json.dumps(record))
    assert "; seed 5. It started from the weights of a shorter training." in read_card(out, work)


def test_quality_is_told_when_it_is_measured(out, work):
    assert "not measured yet" in read_card(out, work)
    (work / "quality.json").write_text(json.dumps(QUALITY))
    (work / "autoencoder.json").write_text(json.dumps({"psnr": 31.234, "pictures": 257}))
    card = read_card(out, work)
    assert "not measured" not in card
    assert "reconstructions of 257 pictures: 31.2 dB PSNR" in card
    assert "240 pairs held out of training" in card
    assert "50.0% (top-1)" in card
    assert "75.0% (top-5)" in card
    assert "62.5% (top-1)" in card
    assert "num_inference_steps 20, sampler ddim" in card


def test_means_over_seeds_are_told(out, work):
    report = QUALITY | {
        "seeds": [0, 1, 2, 3],
        "few_steps": SHARES,
        "sharpness": 0.876,
        "autoencoder_psnr": 33.26,
    }
    (work / "quality.json").write_text(json.dumps(report))
    card = read_card(out, work)
    assert "reconstructions of 240 pictures held out of training: 33.3 dB PSNR" in card
    assert "Drawn in 4 steps, 50.0% of the held-out pairs are nearest (top-1)" in card
    assert "88% of the originals'" in card
    assert "means over 4 seeds" in card


def test_the_notice_owes_every_package(out, work):
    write_card(out, work)
    notice = (out / "NOTICE").read_text(encoding="utf-8")
    for package in PACKAGES:
        entry = f"{package.name} {package.version} (npm)\nLicence: {package.licence}\n"
        assert f"{entry}Author: {package.author}\n" in notice
    assert notice.count("https://creativecommons.org/licenses/by/4.0/") == 1
    assert "open_clip_torch 3.3.0 (PyPI)\nLicence: MIT" in notice


def test_a_checkpoint_that_was_not_kept_is_told(out, work):
    (work / "diffusion.pt").unlink()
    assert "- diffusion: its checkpoint was not kept" in read_card(out, work)
