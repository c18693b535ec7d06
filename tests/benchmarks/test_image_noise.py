"""The curve of noise against strength: what is compared with what."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import image_noise
from benchmarks.__main__ import main
from runtime import Pipeline
from training.pictograms import STYLES

CLEAN = np.random.default_rng(0).integers(0, 256, (3, len(STYLES), 128, 128, 3), np.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """Stand in for the model: strength 0.9 gives the clean picture, the others the given one."""
    asked = []
    data = SimpleNamespace(
        names=["red apple", "blue fish", "tree"], images=CLEAN, held_out=np.zeros((3, 4), bool)
    )
    data.held_out[:, 0] = True

    def pipeline(text, **options):
        asked.append(options)
        start = np.asarray(options["image"])
        if options["strength"] == 0.9 or options["image_noise"] is None:
            return SimpleNamespace(images=[start])
        return SimpleNamespace(images=image_noise.noisy(start[None], options["image_noise"]))

    monkeypatch.setattr(Pipeline, "load", lambda **options: pipeline)
    monkeypatch.setattr(image_noise, "read_pictograms", lambda path: data)
    return asked


def test_noise_is_removed_where_the_picture_is_the_clean_one_again(drawn, tmp_path, capsys):
    pytest.importorskip("torch")  # the machine is described with its version
    out = tmp_path / "noise.json"
    assert main(["image-noise", "--data", "data.npz", "--pictures", "2", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert len(drawn) == 2 * len(image_noise.NOISES) * len(image_noise.STRENGTHS)
    for name, found in measured["noise"].items():
        assert found["removed_from"] == (None if name == "none" else 0.9)
        assert {point["top_1"] for point in found["drawn"]} == {1.0}
    levels = [measured["noise"][f"gaussian:{n}"]["noisy_psnr_db"] for n in ("0.003", "0.01", "0.1")]
    assert levels == sorted(levels, reverse=True)
    table = image_noise.noise_table(measured).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(image_noise.NOISES)
    capsys.readouterr()


def test_more_pictures_than_there_are_is_one_sentence(drawn, capsys):
    assert main(["image-noise", "--pictures", "4"]) == 2
    assert "give 1 to 3" in capsys.readouterr().err
