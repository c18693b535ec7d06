import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from benchmarks import comparison_tables, quality
from benchmarks.__main__ import main
from benchmarks.features import feature_distance
from benchmarks.held_out import held_out_match
from engine.errors import BackendError
from engine.model import Model, find_model
from runtime import Pipeline, Request
from tests.support import pictures
from tests.support.tolerances import FEATURES_RTOL
from training.pictograms import STYLES


@pytest.fixture
def settings(monkeypatch):
    """The same backend twice, once with a bound that nothing reaches; a saving; one missing."""
    same = quality.Setting(precision="float32", backend="cpu", psnr_db=90.0, ssim=0.99, features=0)
    strict = quality.Setting(precision="float32", backend="cpu", psnr_db=101.0, ssim=0.99)
    other = quality.Setting(precision="float32", backend="openvino", psnr_db=1.0, ssim=0.1)
    unguided = replace(same, psnr_db=0, ssim=0, options={"guidance_interval": (0.0, 0.0)})
    named = {"same": same, "strict": strict, "other": other, "unguided": unguided}
    monkeypatch.setattr(quality, "SETTINGS", named)

    def load(**options):
        if options["settings"].backend == "openvino":
            raise BackendError("it is not installed")
        return load_really(**options)

    load_really = Pipeline.load
    monkeypatch.setattr(Pipeline, "load", load)


def test_a_setting_beyond_its_bound_fails_the_run(settings, tmp_path, capsys):
    out = tmp_path / "quality.json"
    options = ["--pictures", "2", "--steps", "1", "--threads", "1", "--out", str(out)]
    assert main(["quality", *options]) == 1
    assert "beyond their bounds: strict, unguided" in capsys.readouterr().err
    measured = json.loads(out.read_text())
    assert measured["exceeded"] == ["strict", "unguided"]
    unguided = measured["settings"]["unguided"]
    assert unguided["psnr_db"]["max"] < 90
    assert unguided["features"]["min"] > 0
    assert unguided["beside"] == quality.REFERENCE_NAME
    assert measured["settings"]["same"]["features"]["max"] == 0
    assert measured["reference"]["seconds"]["min"] > 0
    assert measured["settings"]["other"] == {"skipped": "it is not installed"}
    table = comparison_tables.quality_table(measured)
    assert "| same | 100.0 dB | 100.0 dB | 90 dB | 1.0000 |" in table
    assert "| other | not measured: it is not installed |" in table
    assert "faster, median" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_pictures_that_differ_are_seen():
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(3)]
    given = [255 - picture for picture in expected]
    setting = quality.Setting(precision="float32", backend="cpu", psnr_db=0.0, ssim=0.5)
    found = quality.compared(given, expected, setting)
    assert found["psnr_db"]["median"] < 15
    assert found["exceeded"], "for its SSIM"


def test_prompts_are_drawn_in_turn_with_what_each_setting_wishes():
    calls = []

    def pipeline(prompt, **options):
        calls.append((prompt, options["seed"], options.get("eta")))
        return SimpleNamespace(images=[np.zeros((8, 8, 3), np.uint8)])

    plain = quality.REFERENCE
    settings = {"plain": plain, "saving": replace(plain, options={"eta": 1.0})}
    settings["elsewhere"] = replace(plain, backend="openvino")
    drawn = quality.draw({plain.engines(): pipeline}, settings, 2, 1)
    first, second = quality.PROMPTS[:2]
    assert calls == [(first, 100, None), (first, 100, 1.0), (second, 101, None), (second, 101, 1.0)]
    assert {name: len(found.seconds) for name, found in drawn.items()} == {"plain": 2, "saving": 2}
    assert quality.plain(settings["saving"], settings, drawn) == "plain"
    assert quality.faster([1.0, 2.0], [2.0, 2.0]) == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert len(set(quality.PROMPTS)) == 20


def test_the_listed_settings_name_wishes_that_a_request_has():
    for setting in quality.SETTINGS.values():
        Request(prompt="a", **setting.options)


def test_the_distance_of_features_is_that_of_the_equation():
    distance = feature_distance()
    rng = np.random.default_rng(0)
    a = np.asarray(pictures.drawing(64, 64))
    noise = rng.normal(0, 1, a.shape)
    near, far = ((a + by * noise).clip(0, 255).astype(np.uint8) for by in (4, 40))
    assert distance(a, a) == 0
    assert 0 < distance(a, near) < distance(a, far)
    model = Model.open(find_model("pictogram"))
    peer = diffusers.AutoencoderKL.from_pretrained(model.path / "vae").encoder
    levels, kept = [], lambda module, given, output: levels.append(output)
    for block in peer.down_blocks:
        block.resnets[-1].register_forward_hook(kept)
    with torch.no_grad():
        peer(torch.from_numpy(np.stack([a, far]).transpose(0, 3, 1, 2) / 127.5 - 1).float())
    expected = sum(
        (2 - 2 * torch.cosine_similarity(level[0], level[1], dim=0)).mean().item()
        for level in levels
    )
    assert distance(a, far) == pytest.approx(expected, rel=FEATURES_RTOL)


def test_without_torch_the_distance_is_left_out_and_said_so(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert feature_distance() is None
    measured = quality.measure(1, 1, 1)
    assert "features" not in measured["settings"]["same"]
    assert "are left out: no torch" in comparison_tables.quality_table(measured)


def test_the_held_out_match_of_a_setting(settings, monkeypatch, tmp_path):
    names = ["red apple", "blue fish", "tree"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, len(STYLES), 128, 128, 3), np.uint8)
    held_out = np.zeros((3, len(STYLES)), bool)
    held_out[:, 0] = True
    data = SimpleNamespace(names=names, images=images, held_out=held_out)

    def ideal(captions, **options):
        assert options["guidance_interval"] == (0.0, 0.5)
        assert options["num_inference_steps"] == 20
        order = [next(i for i, name in enumerate(names) if name in text) for text in captions]
        return SimpleNamespace(images=[images[i, 0] for i in order])

    found = held_out_match(ideal, {"guidance_interval": (0.0, 0.5)}, data)
    assert found == {"pictures": 3, "top_1": 1.0, "top_5": 1.0}
    monkeypatch.setattr(quality, "read_pictograms", lambda path: data)
    monkeypatch.setattr(quality, "held_out_match", lambda *given: found)
    measured = quality.measure(1, 1, 1, tmp_path)
    assert measured["settings"]["same"]["match"] == measured["reference"]["match"] == found
    assert "100.0%, in five 100.0% of 3" in comparison_tables.quality_table(measured)


def test_a_data_set_that_is_not_there_or_holds_something_else_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "data.npz"
    assert main(["quality", "--match", str(path)]) == 2
    assert "make it with `python -m training data" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    np.savez(path, images=np.zeros((1, 8, 8, 3), np.uint8), captions=["a"])
    assert main(["quality", "--match", str(path)]) == 2
    assert "holds no pictograms" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


@pytest.mark.parametrize("pictures", ["0", "21"])
def test_more_pictures_than_prompts_are_refused(pictures, capsys):
    assert main(["quality", "--pictures", pictures]) == 2
    assert "give 1 to 20" in capsys.readouterr().err
