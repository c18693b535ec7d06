"""Schedules and losses compared: each is trained once, judged alike, and kept."""

import json

import pytest

from engine.errors import RequestError
from engine.graphs.graph import graph_name
from engine.model import COMPONENTS, Model
from tests.support.digits import write_digits
from tests.support.pixel_models import TINY
from tests.support.traced import trace_once
from training import comparison, ddpm, devices
from training.__main__ import main
from training.comparison import Comparison, Variant
from training.idx import LabelledPictures
from training.loop import LoopSettings

CLASSES = ("zero", "one")
SETTINGS = LoopSettings(steps=1, batch_size=2, learning_rate=1e-3, muon=True)


def make(**changed):
    chosen = {
        "middle": Variant(schedule="cosine", loss="l2"),
        "classes": CLASSES,
        "prediction": "v_prediction",
        "settings": SETTINGS,
        "judge_settings": LoopSettings(steps=2, batch_size=4, learning_rate=1e-3),
        "drawing": {"num_inference_steps": 1},
        "unet": TINY,
    }
    return Comparison(**{**chosen, **changed})


@pytest.fixture
def splits(tmp_path):
    (tmp_path / "idx").mkdir()
    write_digits(tmp_path / "idx", per_class=3, side=8, classes=2)
    return [LabelledPictures.read(tmp_path / "idx", name, 2) for name in ("train", "test")]


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """Take graphs from where all tests have them, and count what is asked for."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    asked = []

    def export_part(model: Model, part, precision, folder):
        asked.append(part)
        graph = trace_once(part, model.configs[COMPONENTS[part]], precision)
        path = folder / graph_name(part, graph.config, precision)
        path.write_bytes(graph.model.SerializeToString())

    monkeypatch.setattr(comparison, "export_part", export_part)
    return asked


def test_each_schedule_has_one_loss_and_each_loss_one_schedule():
    names = [variant.name for variant in make().variants()]
    assert names == [
        *("linear-l2", "cosine-l2", "quadratic-l2", "sigmoid-l2"),
        *("cosine-l1", "cosine-huber"),
    ]
    other = make(middle=Variant(schedule="sigmoid", loss="huber")).variants()
    assert [v.name for v in other] == [
        *("linear-huber", "cosine-huber", "quadratic-huber", "sigmoid-huber"),
        *("sigmoid-l1", "sigmoid-l2"),
    ]


def test_variants_are_trained_once_and_kept(splits, traced, tmp_path, monkeypatch):
    trained, train = [], ddpm.train

    def counted(*arguments, config, loss, **options):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append((config["beta_schedule"], loss))
        return train(*arguments, config=config, loss=loss, **options)

    monkeypatch.setattr(ddpm, "train", counted)
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(make(), *splits, work, out)
    assert len(json.loads((work / comparison.FIGURES).read_text())["variants"]) == 4
    kept = list(trained)
    trained.clear()
    found = comparison.compare(make(), *splits, work, out)
    assert kept + trained == [
        *(("linear", "l2"), ("squaredcos_cap_v2", "l2"), ("scaled_linear", "l2")),
        *(("sigmoid", "l2"), ("squaredcos_cap_v2", "l1"), ("squaredcos_cap_v2", "huber")),
    ]
    assert sorted(traced) == ["step", "text_encoder", "vae_decoder"], "one graph serves them all"
    for name, row in found["variants"].items():
        assert row["steps"] == 1
        assert row["pictures"] == 6
        assert Model.open(out / name).sample_size == 8
    lines = (out / comparison.TABLE).read_text().splitlines()
    assert lines == comparison.table(found).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("| linear | l2 | 1 | ")
    assert {line.count("|") for line in lines} == {7}
    trained.clear()
    assert comparison.compare(make(), *splits, work, out) == found
    assert trained == []


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": LoopSettings(steps=2, batch_size=2, learning_rate=1e-3)},
        {"classes": ("a", "b")},
        {"prediction": "epsilon"},
        {"drawing": {"num_inference_steps": 2}},
        {"middle": Variant(schedule="linear", loss="l2")},
    ],
    ids=["steps", "classes", "prediction", "drawing", "middle"],
)
def test_figures_of_another_comparison_are_not_mixed_in(splits, tmp_path, changed):
    counts = {"train": 6, "test": 6}
    figures = {"request": {**make().described(), "pictures": counts}, "variants": {}}
    (tmp_path / comparison.FIGURES).write_text(json.dumps(figures))
    with pytest.raises(RequestError, match="of another comparison; give another --work"):
        comparison.compare(make(**changed), *splits, tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / comparison.FIGURES).read_text()) == figures


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"request": 1}', "\0"])
def test_a_file_that_is_no_comparison_is_one_sentence(splits, tmp_path, text):
    (tmp_path / comparison.FIGURES).write_text(text)
    with pytest.raises(RequestError, match="of another comparison"):
        comparison.compare(make(), *splits, tmp_path, tmp_path / "out")


def test_the_command_compares_what_it_is_asked_to(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path, per_class=1, side=8)
    asked = []

    def compare(chosen, train_split, test_split, work, out):
        asked.append((chosen, len(train_split.labels), work, out))
        return {"variants": {}}

    monkeypatch.setattr(comparison, "compare", compare)
    given = ["--idx", str(tmp_path), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    more = ["--minutes", "4", "--loss", "huber", "--sampler-steps", "7", "--compare"]
    assert main(["ddpm", *given, *more]) == 0
    ((chosen, count, work, out),) = asked
    assert chosen.middle == Variant(schedule="cosine", loss="huber")
    assert (chosen.settings.minutes, chosen.settings.muon) == (4, True)
    assert chosen.drawing == {"num_inference_steps": 7}
    assert (count, work, out) == (10, tmp_path / "w", tmp_path / "o")
    assert "noise schedule" in capsys.readouterr().out
    monkeypatch.setattr(devices, "count", lambda: 2)
    assert main(["ddpm", *given, *more]) == 2
    assert "runs in one process" in capsys.readouterr().err
    assert len(asked) == 1
