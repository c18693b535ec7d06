"""`python -m training search`: hyper-parameters by TPE, beside random ones and the defaults."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import RequestError, libraries_of
from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder, search, search_report, ship
from training.dataset import PictogramTrainingSet, load_training_set
from training.diffusers_folder import write_json
from training.diffusion import Denoiser, denoise
from training.options import DEFAULTS
from training.pictograms import Pictograms
from training.quality import TOPS, ranks
from training.search import Trial, Trials
from training.search_data import Measured, split

FOLDER, REPORT, ASKED = "search", "search.json", "asked.json"
NUMBERS = ("minutes", "trial_minutes", "final_minutes", "trial_steps", "trials", "seeds")
DRAWN_AT_ONCE = 40


def run_search(options: argparse.Namespace) -> None:
    """Search, measure the best once, and write `search.json`, `search.md` and `search.png`.

    A report that is there is shown again: nothing is measured a second time. Raises RequestError
    without pictograms, for numbers that are not positive, and for a folder of another search.
    """
    folder = options.work / FOLDER
    report_file = folder / REPORT
    if options.threads:
        torch.set_num_threads(options.threads)
    with libraries_of("search"):
        if not report_file.exists():
            asked = _asked(options)
            pictograms = _pictograms(options.work)
            _note({**asked, "subjects": len(pictograms.names)}, folder)
            write_json(report_file, _measure(options, asked, _trials(options, pictograms)))
        report = json.loads(report_file.read_text(encoding="utf-8"))
        written = search_report.write(report, folder)
    print(search_report.table(report))
    print("\n".join(map(str, (report_file, *written))))


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is searched; raises RequestError for numbers that are not positive."""
    for name in NUMBERS:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise RequestError(f"--{name.replace('_', '-')} is {value}; give a positive number")
    asked = {name: getattr(options, name) for name in ("model", *NUMBERS)}
    return {**asked, "ranges": _ranges()}


def _pictograms(work: Path) -> Pictograms:
    """Read the data set; raises RequestError where it is another's pictures."""
    data = load_training_set(work)
    if not isinstance(data, PictogramTrainingSet):
        raise RequestError(
            f"{work} holds captioned pictures; a search splits pictograms by their subjects"
        )
    return data.pictograms


def _note(asked: Mapping[str, Any], folder: Path) -> None:
    """Write down what is searched in a folder; raises RequestError where it was something else."""
    path = folder / ASKED
    if path.exists():
        noted = json.loads(path.read_text(encoding="utf-8"))
        if differing := sorted(name for name in asked if noted.get(name) != asked[name]):
            raise RequestError(
                f"{folder} is of a search with another {', '.join(differing)}; give the same, or "
                "another --work"
            )
    write_json(path, asked)


def _measure(
    options: argparse.Namespace, asked: Mapping[str, Any], trials: Trials
) -> dict[str, Any]:
    _, _, batch_size, rate, _ = DEFAULTS["diffusion"]
    default = search.default_parameters(batch_size, rate)
    searches = _searches(options, trials, default)
    tried = [found for way in search.SEARCHES for found in searches[way]]
    chosen = search.best_of_all(tried)
    longer = dataclasses.replace(
        trials, minutes=options.final_minutes, folder=trials.folder / "final"
    )
    last = {
        "default": _single(longer, "default", default, 0),
        "best": _single(longer, "best", chosen.parameters, 0),
    }
    return {
        "request": _request(options, asked, trials),
        "ranges": asked["ranges"],
        "searches": {
            way: [_reported(trials, found, seed) for seed, found in enumerate(each)]
            for way, each in searches.items()
        },
        "importances": search.importances(tried),
        "final": {name: _final(longer, found, name) for name, found in last.items()},
    }


def _searches(
    options: argparse.Namespace, trials: Trials, default: search.Parameters
) -> dict[str, list[dict[str, Trial]]]:
    """Run the defaults and every search, once for each seed; return their trials by name."""
    seeds = range(options.seeds)
    found = {"default": [_single(trials, f"default-{seed}", default, seed) for seed in seeds]}
    for way in search.SEARCHES:
        found[way] = []
        for seed in seeds:
            tried = search.search(trials, way, options.minutes, seed, options.trials)
            found[way].append(tried)
            name = search.best(tried)
            told = "none came to its end" if name is None else f"{tried[name].loss:.4f} ({name})"
            print(f"{way}, seed {seed}: {len(tried)} trials, best loss {told}", flush=True)
    return found


def _request(
    options: argparse.Namespace, asked: Mapping[str, Any], trials: Trials
) -> dict[str, Any]:
    splits = trials.splits
    return {
        **{name: value for name, value in asked.items() if name != "ranges"},
        "subjects": dict(splits.subjects),
        "pictures": {name: len(getattr(splits, name).latents) for name in splits.subjects},
        "held_out": len(splits.held_out.latents),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "optuna": version("optuna"),
    }


def _trials(options: argparse.Namespace, pictograms: Pictograms) -> Trials:
    """Encode the data, by the autoencoder of a model that `ship` wrote."""
    folder = options.work / FOLDER
    model = find_model(options.model)
    tokenizer = Tokenizer.load(model / "tokenizer")
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(ship.read_model(model)[1])
    trained.to(options.device)
    return Trials(
        splits=split(pictograms, trained, tokenizer, folder),
        tokenizer=tokenizer,
        autoencoder=trained,
        folder=folder / "trials",
        minutes=options.trial_minutes,
        steps=options.trial_steps or 10**9,
        device=options.device,
    )


def _single(
    trials: Trials, name: str, parameters: search.Parameters, seed: int
) -> dict[str, Trial]:
    return {name: trials.run(name, parameters, seed, lambda piece, loss: False)}


def _reported(trials: Trials, found: Mapping[str, Trial], seed: int) -> dict[str, Any]:
    """Tell of a search, and measure its best on the test part."""
    name = search.best(found)
    tested = None if name is None else trials.loss(trials.load(name), trials.splits.test)
    return {
        "seed": seed,
        "trials": [dataclasses.asdict(trial) for trial in found.values()],
        "validation": None if name is None else found[name].loss,
        "test": tested,
    }


def _final(trials: Trials, found: Mapping[str, Trial], name: str) -> dict[str, Any]:
    """Measure a longer training on all that it has not seen: None each where it diverged."""
    trial, parts = found[name], ("validation", "test", "held_out")
    told: dict[str, Any] = {"parameters": dict(trial.parameters)}
    if trial.state != "complete":
        return told | dict.fromkeys((*parts, *(f"top_{k}" for k in TOPS)))
    denoiser = trials.load(name)
    held_out = trials.splits.held_out
    places = ranks(_draw(trials, denoiser, held_out), held_out.originals)
    return {
        **told,
        **{part: trials.loss(denoiser, getattr(trials.splits, part)) for part in parts},
        **{f"top_{k}": float((places <= k).mean()) for k in TOPS},
    }


def _draw(trials: Trials, denoiser: Denoiser, measured: Measured) -> np.ndarray:
    """Draw every caption as previews of a training are: (n, H, W, 3) uint8."""
    empty = torch.from_numpy(trials.tokenizer([""]).input_ids).long()
    size = tuple(measured.latents.shape[1:])
    drawn = []
    for ids in measured.input_ids.split(DRAWN_AT_ONCE):
        given = torch.cat([empty, ids]).to(trials.device)
        drawn.append(denoise(denoiser, trials.autoencoder, given, size=size)[-1])
    return np.concatenate(drawn)


def _ranges() -> dict[str, str]:
    """Return what is searched, in words."""
    return {
        name: " or ".join(str(each).lower() for each in wanted)
        if isinstance(wanted, list)
        else f"{wanted[0]:g} to {wanted[1]:g}"
        for name, wanted in search.RANGES.items()
    }
