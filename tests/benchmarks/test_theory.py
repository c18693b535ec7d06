"""The figures of docs/theory.md: curves of the schedules, the loss by noise, and guidance."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import plots, theory
from benchmarks.__main__ import main
from runtime import Pipeline
from training.pictograms import STYLES, Pictograms

RNG = np.random.default_rng(0)


@pytest.fixture
def pictograms():
    """Six pairs are held out; their names are their places."""
    held_out = np.zeros((6, len(STYLES)), bool)
    held_out[:, 1] = True
    return Pictograms(
        names=tuple(map(str, range(6))),
        keywords=((),) * 6,
        images=RNG.integers(0, 256, (6, len(STYLES), 128, 128, 3), np.uint8),
        held_out=held_out,
        everyday=np.ones(6, bool),
    )


@pytest.fixture
def drawn(pictograms, monkeypatch):
    """Stand in for the model: from scale 5 on it draws the original, below it another each time."""

    def pipeline(texts, *, seed, guidance_scale, **options):
        subject = int(texts[0].split(",")[0])
        others = [(subject + 1 + i) % 6 for i in range(len(texts))]
        chosen = [subject] * len(texts) if guidance_scale >= 5 else others
        return SimpleNamespace(images=[pictograms.images[each, 1] for each in chosen])

    monkeypatch.setattr(Pipeline, "load", lambda model, **options: pipeline)


def test_match_and_diversity_are_told_apart(pictograms, drawn):
    pairs = np.argwhere(pictograms.held_out)
    curve = theory.guidance(pictograms, pairs, np.array([0, 3]), None)
    assert [point["scale"] for point in curve] == list(theory.SCALES)
    for point in curve:
        if point["scale"] >= 5:
            assert point == {"scale": point["scale"], "top_1": 1.0, "diversity": 0.0}
        else:
            assert point["top_1"] == 0
            assert point["diversity"] == pytest.approx(1, abs=0.1), "they are originals"


def test_the_curves_are_signal_and_noise():
    for name, curve in theory.schedules().items():
        signal, noise = np.array(curve["signal"]), np.array(curve["noise"])
        np.testing.assert_allclose(signal**2 + noise**2, 1, atol=1e-4)
        assert (np.diff(signal) < 0).all(), name
        assert (curve["time"][0], curve["time"][-1]) == (0, 1)
    assert theory.schedules()["pictogram"]["signal"][-1] == pytest.approx(1 / 80, abs=1e-3)


def test_the_command_measures_and_the_plots_show_it(
    pictograms, drawn, tmp_path, monkeypatch, capsys
):
    """The loss is that of the model that ships, on noise."""
    pytest.importorskip("matplotlib")
    data, out = tmp_path / "data.npz", tmp_path / "theory.json"
    pictograms.save(data)
    monkeypatch.setattr(theory, "LEVELS", 3)
    monkeypatch.setattr(theory, "LOSS_PICTURES", 4)
    asked = ["theory", "--data", str(data), "--pictures", "2", "--out", str(out)]
    assert main(asked) == 0
    capsys.readouterr()
    measured = json.loads(out.read_text())
    curves = measured["loss"].values()
    assert measured["request"]["loss_pictures"] == {"trained": 4, "held_out": 4}
    assert [curve["timesteps"] for curve in curves] == [[0, 500, 999]] * 2
    assert len({tuple(curve[name]) for curve in curves for name in ("caption", "no_caption")}) == 4
    assert all(value > 0 for curve in curves for value in curve["caption"])
    table = theory.guidance_table(measured).splitlines()[2:]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(theory.SCALES)
    panels = plots.noise_schedules(measured).axes
    assert [len(panel.lines) for panel in panels] == [1 + len(theory.SCHEDULES)] * 2
    (loss,) = plots.loss_by_noise(measured).axes
    assert list(loss.lines[3].get_ydata()) == measured["loss"]["held_out"]["caption"]
    (curve,) = plots.guidance_scale(measured).axes
    assert list(curve.lines[0].get_ydata()) == [p["top_1"] for p in measured["guidance"]]
    assert main([*asked[:-4], "--pictures", "7"]) == 2
    assert "give 1 to 6" in capsys.readouterr().err
