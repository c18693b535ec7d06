"""The search of hyper-parameters: splits, trials that go on, searches, and the command."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from engine.errors import USER_ERROR, RequestError
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers.noise_schedule import NoiseSchedule
from training import autoencoder, dataset, diffusion, search, search_command, search_report
from training.__main__ import main
from training.denoising_loss import mean_loss, squared_errors
from training.diffusion import SCHEDULER, Denoiser, initialise
from training.loop import DivergenceError
from training.options import DEFAULTS
from training.pictograms import STYLES, Pictograms
from training.search import PIECES, RANGES, Trial, Trials
from training.search_data import SHARES, split, split_subjects
from training.text_encoders import MAX_TOKENS
from training.vocabulary import cut_vocabulary, write_tokenizer

pytest.importorskip("optuna")

SUBJECTS, SIDE = 20, 32
TINY = dataclasses.replace(
    diffusion.UNET,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2),
)
TINY_AUTOENCODER = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
PARAMETERS = {
    "learning_rate": 1e-3, "weight_decay": 0.1, "batch_size": 2, "warmup_steps": 2,
    "ema_decay": 0.9, "muon": False,
}  # fmt: skip


def pictograms(count=SUBJECTS):
    """Each pair has a colour of its own; the first subjects have a style that is held out."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (count, len(STYLES), 1, 1, 3), np.uint8)
    held_out = np.zeros((count, len(STYLES)), bool)
    held_out[:4] = np.eye(4, len(STYLES), dtype=bool)
    return Pictograms(
        names=tuple(f"thing {chr(97 + i)}" for i in range(count)),
        keywords=((),) * count,
        images=np.broadcast_to(colours, (count, len(STYLES), SIDE, SIDE, 3)).copy(),
        held_out=held_out,
        everyday=np.ones(count, bool),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary, merges = cut_vocabulary(["thing"], 520, [("t", "h")])
    write_tokenizer(folder, vocabulary, merges, MAX_TOKENS)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def splits(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    trained = Autoencoder(TINY_AUTOENCODER).eval()
    return split(pictograms(), trained, tokenizer, tmp_path_factory.mktemp("search"))


@pytest.fixture
def trials(splits, tokenizer, tmp_path):
    return Trials(
        splits=splits,
        tokenizer=tokenizer,
        autoencoder=Autoencoder(TINY_AUTOENCODER).eval(),
        folder=tmp_path,
        minutes=1.0,
        steps=8,
        unet=TINY,
    )


@pytest.fixture
def scripted(monkeypatch):
    """Trials of a minute each whose loss the learning rate decides; returns the calls."""
    calls = []

    def train(self, name, parameters, seed, piece):
        calls.append((name, piece))
        self._weights(name).parent.mkdir(parents=True, exist_ok=True)
        if piece + 1 == PIECES:
            self._weights(name).write_text(name)
        return abs(math.log10(parameters["learning_rate"]) + 2.5) + 1 / (piece + 1)

    monkeypatch.setattr(Trials, "_train", train)

    def seconds(checkpoint):
        return 15.0 * (1 + max(piece for name, piece in calls if name == checkpoint.parent.name))

    monkeypatch.setattr(search, "_seconds", seconds)
    return calls


@pytest.mark.parametrize("count", [7, 20, 565, 1531])
def test_subjects_are_shared_out_whole(count):
    parts = split_subjects(count)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    for name, share in SHARES.items():
        assert len(parts[name]) == pytest.approx(share * count, abs=1)
    assert all(np.array_equal(parts[name], split_subjects(count)[name]) for name in SHARES)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_part_without_subjects_is_refused(count):
    with pytest.raises(RequestError, match=f"has {count} subjects.*give one of at least"):
        split_subjects(count)


def test_no_subject_is_in_two_parts_and_no_held_out_pair_in_any(splits):
    data = pictograms()
    parts = split_subjects(SUBJECTS)

    def places(measured):
        """Find pairs by the colour that is theirs alone."""
        colours = data.images[:, :, 0, 0].astype(int)
        return [
            tuple(np.argwhere((colours == original[0, 0]).all(axis=2))[0])
            for original in measured.originals
        ]

    for name in ("validation", "test"):
        found = places(getattr(splits, name))
        assert {subject for subject, _ in found} == set(parts[name])
        assert not any(data.held_out[pair] for pair in found)
    assert places(splits.held_out) == [(i, i) for i in range(4)]
    names = {
        text.removeprefix("a ").split(",")[0].split(" style ")[-1]
        for i in range(len(splits.train.latents))
        for text in splits.train.captions(i, np.random.default_rng(i))
        if text.endswith(" style") and "," in text
    }
    assert names == {data.names[subject] for subject in parts["train"]}
    sizes = [
        len(splits.train.latents),
        *(len(getattr(splits, n).latents) for n in SHARES if n != "train"),
    ]
    assert sum(sizes) == SUBJECTS * len(STYLES) - 4


def test_the_loss_is_that_of_evenly_spread_noise(tokenizer):
    """A denoiser that answers nothing, for latents that are nothing, is off by the noise in v."""
    torch.manual_seed(0)
    denoiser = Denoiser(tokenizer.vocab_size, TINY).eval()
    initialise(denoiser)
    latents = torch.zeros(50, 8, 4, 4)
    input_ids = torch.from_numpy(tokenizer(["thing"] * 50).input_ids).long()
    found = mean_loss(denoiser, latents, input_ids)
    signal = NoiseSchedule.from_config(SCHEDULER).alphas_cumprod
    assert found == pytest.approx(signal.mean(), rel=0.02)
    assert found == mean_loss(denoiser, latents, input_ids)
    level = torch.full((50,), 300)
    errors = squared_errors(denoiser, latents, input_ids, level)
    assert errors.shape == (50,)
    assert errors.mean() == pytest.approx(signal[300], rel=0.05)


def test_a_trial_that_was_stopped_goes_on_as_an_unbroken_one(trials, tmp_path):
    whole = trials.run("whole", PARAMETERS, 3, lambda piece, loss: False)
    assert whole.state == "complete"
    assert len(whole.losses) == PIECES
    assert whole.loss == whole.losses[-1]
    assert not (tmp_path / "whole" / "diffusion.pt").exists(), "what trained on is not kept"

    def stop(piece, loss):
        if piece == 1:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        trials.run("stopped", PARAMETERS, 3, stop)
    assert trials.read("stopped").losses == whole.losses[:1]
    heard = []
    again = trials.run("stopped", {}, 3, lambda piece, loss: heard.append(piece))
    assert heard == list(range(PIECES))
    assert again.losses == whole.losses
    measured = trials.splits.validation
    assert trials.loss(trials.load("whole"), measured) == pytest.approx(whole.loss, rel=1e-6)
    assert trials.run("whole", {}, 0, lambda piece, loss: True) == whole, "it is not trained again"


def test_a_trial_that_falls_behind_is_ended(trials, tmp_path):
    trial = trials.run("early", PARAMETERS, 0, lambda piece, loss: piece == 1)
    assert (trial.state, len(trial.losses)) == ("pruned", 2)
    assert math.isinf(trial.loss)
    assert [path.name for path in (tmp_path / "early").iterdir()] == ["trial.json"]


def test_random_search_fills_its_minutes(trials, scripted):
    found = search.search(trials, "random", 5.0, 0)
    assert len(found) == 5
    assert {trial.state for trial in found.values()} == {"complete"}
    for trial in found.values():
        assert trial.parameters.keys() == RANGES.keys()
        for name, wanted in RANGES.items():
            value = trial.parameters[name]
            assert value in wanted if isinstance(wanted, list) else wanted[0] <= value <= wanted[1]
    other = search.search(dataclasses.replace(trials, folder=trials.folder / "b"), "random", 5.0, 1)
    assert [t.parameters for t in found.values()] != [t.parameters for t in other.values()]
    kept = [path.parent.name for path in trials.folder.glob("random*/weights.pt")]
    assert kept == [search.best(found)]
    assert found[kept[0]].loss == min(trial.loss for trial in found.values())


def test_the_pruner_makes_room_for_more_trials(trials, scripted):
    found = search.search(trials, "tpe", 20.0, 0)
    states = [trial.state for trial in found.values()]
    assert states[: search.STARTUP] == ["complete"] * search.STARTUP
    assert "pruned" in states
    assert len(found) > 20
    assert sum(trial.seconds for trial in found.values()) == pytest.approx(1200, abs=31)


@pytest.mark.parametrize("way", search.SEARCHES)
def test_a_search_that_was_stopped_goes_on_as_an_unbroken_one(trials, scripted, monkeypatch, way):
    whole = search.search(trials, way, 9.0, 0)
    part = dataclasses.replace(trials, folder=trials.folder / "part")
    train, left = Trials._train, [13]

    def stopping(self, name, parameters, seed, piece):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return train(self, name, parameters, seed, piece)

    monkeypatch.setattr(Trials, "_train", stopping)
    with pytest.raises(KeyboardInterrupt):
        search.search(part, way, 9.0, 0)
    assert search.search(part, way, 9.0, 0) == whole
    before = len(scripted)
    assert search.search(part, way, 9.0, 0) == whole
    assert len(scripted) == before, "nothing is trained again"


def test_a_trial_that_diverges_counts_and_the_search_goes_on(trials, scripted, monkeypatch):
    train = Trials._train

    def diverging(self, name, parameters, seed, piece):
        if name.endswith(("1", "2")) and piece == 2:
            raise DivergenceError("the loss is nan at step 20")
        return train(self, name, parameters, seed, piece)

    monkeypatch.setattr(Trials, "_train", diverging)
    found = search.search(trials, "tpe", 60.0, 0, 6)
    assert [trial.state for trial in found.values()][:4] == [
        "complete", "diverged", "diverged", "complete",
    ]  # fmt: skip
    assert len(found) == 6
    assert found[search.best(found)].state == "complete"


def test_a_search_in_which_nothing_ends_is_refused():
    lost = {"a": Trial(parameters=PARAMETERS, losses=(1.0,), state="pruned")}
    assert search.best(lost) is None
    assert search.best({}) is None
    with pytest.raises(RequestError, match="no trial came to its end"):
        search.best_of_all([lost])


def test_a_loss_that_is_no_number_ends_the_trial(trials, monkeypatch):
    monkeypatch.setattr(search, "mean_loss", lambda *given: math.nan)
    trial = trials.run("nan", PARAMETERS, 0, lambda piece, loss: False)
    assert (trial.state, trial.losses) == ("diverged", ())


def test_the_parameter_that_decides_is_the_most_important(trials, scripted):
    found = search.search(trials, "random", 30.0, 0)
    shares = search.importances([found])
    assert next(iter(shares)) == "learning_rate"
    assert shares["learning_rate"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
    assert search.importances([dict(list(found.items())[:3])]) == {}


def test_the_defaults_are_those_of_the_training():
    _, _, batch_size, rate, _ = DEFAULTS["diffusion"]
    assert search.default_parameters(batch_size, rate) == {
        "learning_rate": 3e-3, "weight_decay": 0.2, "batch_size": 48, "warmup_steps": 200,
        "ema_decay": 0.999, "muon": True,
    }  # fmt: skip


@pytest.fixture
def asked(tmp_path, tokenizer, monkeypatch):
    """The command's options, for a tiny model and a few steps."""
    data = pictograms()
    data.save(tmp_path / "data.npz")
    monkeypatch.setattr(search_command, "Trials", partial(Trials, unet=TINY))
    monkeypatch.setattr(dataset, "CAPTIONS", 2)
    monkeypatch.setattr(search, "PIECES", 2)
    monkeypatch.setitem(RANGES, "batch_size", [2, 4])
    monkeypatch.setattr(
        search_command, "DEFAULTS", {"diffusion": (*DEFAULTS["diffusion"][:2], 2, 3e-3, 2)}
    )
    return [
        "search", "--work", str(tmp_path), "--trials", "2", "--seeds", "1", "--trial-steps", "2",
    ]  # fmt: skip


def test_the_command_writes_a_report_once(asked, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert main(asked) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "search" / "search.json").read_text())
    assert report["request"]["subjects"] == {"train": 14, "validation": 3, "test": 3}
    assert report["request"]["held_out"] == 4
    for way, count in (("default", 1), ("random", 2), ("tpe", 2)):
        (found,) = report["searches"][way]
        assert len(found["trials"]) == count
        losses = [t["losses"][-1] for t in found["trials"] if t["state"] == "complete"]
        assert found["validation"] == min(losses)
        assert 0 < found["test"] != found["validation"]
    best = report["final"]["best"]["parameters"]
    assert best in [t["parameters"] for w in search.SEARCHES
                    for t in report["searches"][w][0]["trials"]]  # fmt: skip
    assert all(0 <= report["final"][name]["top_1"] <= 1 for name in ("default", "best"))
    page = (tmp_path / "search" / "search.md").read_text()
    assert page in told
    assert (tmp_path / "search" / "search.png").read_bytes().startswith(b"\x89PNG")

    def again(*given):
        raise AssertionError("the test part is measured once")

    monkeypatch.setattr(search_command, "_measure", again)
    assert main(asked) == 0
    assert page in capsys.readouterr().out


def test_bad_options_are_one_sentence(asked, tmp_path, capsys):
    for option, value in (
        ("--minutes", "0.0"),
        ("--seeds", "-1"),
        ("--trial-steps", "0"),
        ("--final-minutes", "nan"),
    ):
        assert main([*asked, option, value]) == USER_ERROR
        error = capsys.readouterr().err
        assert f"{option} is {value}; give a positive number" in error
        assert error.count("\n") == 1
    (tmp_path / "search").mkdir()
    noted = {"trial_minutes": 9.0}
    (tmp_path / "search" / "asked.json").write_text(json.dumps(noted))
    assert main(asked) == USER_ERROR
    assert "search with another" in (error := capsys.readouterr().err)
    assert "trial_minutes" in error
    (tmp_path / "data.npz").unlink()
    assert main(["search", "--work", str(tmp_path / "other")]) == USER_ERROR
    assert "python -m training data" in capsys.readouterr().err


def example_report():
    """Three searches, one of them without a trial that came to its end."""
    trial = {"parameters": PARAMETERS, "losses": [0.5, 0.4, 0.3, 0.25], "seconds": 60.0}
    whole, early = {**trial, "state": "complete"}, {**trial, "state": "pruned"}
    found = {"trials": [early, whole], "validation": 0.25, "test": 0.3}
    lost = {"trials": [early], "validation": None, "test": None}
    last = {"parameters": PARAMETERS, "validation": 0.2, "test": 0.21, "held_out": 0.22}
    last |= {"top_1": 0.125, "top_5": 0.5}
    return {
        "request": {
            "subjects": {"train": 7, "validation": 2, "test": 2}, "minutes": 10.0,
            "trial_minutes": 1.5, "final_minutes": 5.0, "seeds": 2, "device": "cpu", "threads": 2,
            "torch": "2", "optuna": "4", "held_out": 240,
        },
        "ranges": dict.fromkeys(RANGES, "1 to 2"),
        "searches": {"default": [found, lost], "random": [found, lost], "tpe": [lost, lost]},
        "importances": {"learning_rate": 0.75, "muon": 0.25},
        "final": {"default": last, "best": last},
    }  # fmt: skip


def test_the_table_has_every_search_and_parameter():
    page = search_report.table(example_report())
    tables = [block.splitlines() for block in page.split("\n\n")[1:]]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert [len(lines) for lines in tables] == [2 + 3, 2 + len(RANGES), 2 + 2]
    assert "| random search | 3, 2 | 0.2500, — | 0.2500 | 0.3000 |" in page
    assert "| learning_rate | 1 to 2 | 0.001 | 0.001 | 75% |" in page
    assert "| the best parameters | 0.2000 | 0.2100 | 0.2200 | 12.5% | 50.0% |" in page


def test_the_plot_has_a_line_for_each_search(tmp_path):
    pytest.importorskip("matplotlib")
    progress, rates, shares = search_report.figure(example_report()).axes
    lines = [line for line in progress.lines if line.get_linestyle() == "-"]
    assert len(lines) == 4
    assert list(lines[0].get_xdata()) == [1, 2]
    assert np.isnan(lines[0].get_ydata()[0])
    assert lines[0].get_ydata()[1] == 0.25
    assert sum(len(line.get_xdata()) for line in rates.lines) == 1
    assert [patch.get_width() for patch in shares.patches] == [0.25, 0.75]
    assert [path.name for path in search_report.write(example_report(), tmp_path)] == [
        "search.md",
        "search.png",
    ]
