"""`python -m training finish`: a decoder trained on against a discriminator, and what it gained."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

from engine.errors import RequestError
from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from training import autoencoder, finish, perceptual, ship
from training.dataset import PictogramTrainingSet, load_training_set
from training.diffusers_folder import WEIGHTS, write_json, write_weights
from training.loop import LoopSettings
from training.mobilenet import MobileNet
from training.options import loop_settings

CLASSIFIER = LoopSettings(steps=2000, batch_size=64, learning_rate=2e-3)


def run_finish(options: argparse.Namespace) -> None:
    """Train the classifier of the loss, then the decoder; write `vae/`, print what it gained.

    Raises RequestError for other pictures than pictograms.
    """
    data = load_training_set(options.work)
    if not isinstance(data, PictogramTrainingSet):
        raise RequestError("finish learns from pictograms, whose subjects and styles are known")
    folder = find_model(options.model)
    classifier = perceptual.train(
        data.images,
        data.pairs,
        dataclasses.replace(CLASSIFIER, device=options.device, seed=options.seed),
        options.work,
        draws=data.draws,
    )
    before = _read(folder)
    finished = finish.train(
        _read(folder),
        data.images,
        classifier,
        loop_settings(options),
        options.work,
        draws=data.draws,
    ).cpu()
    out = options.out / "vae"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "vae" / "config.json", out)
    write_weights(finished, out / WEIGHTS["vae"])
    held_out = data.pictograms.images[data.pictograms.held_out]
    judge = MobileNet.load(options.work / "packages")
    found = finish.compare(before, finished, held_out, judge).asdict()
    report = {"held_out": len(held_out), **found}
    write_json(options.work / "finish.json", report)
    print(json.dumps(report, indent=2))


def _read(folder: Path) -> Autoencoder:
    module = Autoencoder(autoencoder.CONFIG).eval()
    module.load_state_dict(ship.read_model(folder)[1])
    return module
