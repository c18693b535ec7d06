"""`python -m training ddpm`, `gan` and `judge`: small models in pixels of classes, measured."""

import argparse
import dataclasses
import json

import numpy as np

from engine.errors import RequestError
from runtime import Pipeline
from training import comparison, ddpm, devices, gan, judge
from training.comparison import Comparison, Variant
from training.grids import save_grid
from training.idx import LabelledPictures
from training.loop import LoopSettings
from training.options import loop_settings


def run_ddpm(options: argparse.Namespace) -> None:
    """Train on labelled pictures and write the model; or compare schedules and losses."""
    classes = _classes(options)
    pictures = LabelledPictures.read(options.idx, "train", len(classes))
    settings = dataclasses.replace(loop_settings(options), muon=True, weight_decay=0.1)
    if options.compare:
        _compare(options, classes, pictures, settings)
        return
    config = ddpm.scheduler(options.beta_schedule, options.prediction)
    folder = options.work / "tokenizer"
    tokenizer = ddpm.class_tokenizer(folder, classes)
    denoiser = ddpm.train(
        pictures, tokenizer, classes, settings, options.work, config=config, loss=options.loss
    )
    ddpm.write(options.out, denoiser.cpu(), folder, config, pictures.images.shape[1])
    print(f"{options.out}; make its graphs with `python -m export {options.out}`")


def _compare(
    options: argparse.Namespace,
    classes: list[str],
    pictures: LabelledPictures,
    settings: LoopSettings,
) -> None:
    if devices.count() > 1:
        raise RequestError("--compare runs in one process; start it without torchrun")
    asked = Comparison(
        middle=Variant(schedule=options.beta_schedule, loss=options.loss),
        classes=classes,
        prediction=options.prediction,
        settings=settings,
        judge_settings=dataclasses.replace(
            judge.SETTINGS, device=options.device, seed=options.seed
        ),
        drawing={"num_inference_steps": options.sampler_steps},
    )
    tested = LabelledPictures.read(options.idx, "test", len(classes))
    found = comparison.compare(asked, pictures, tested, options.work, options.out)
    print(comparison.table(found))


def run_gan(options: argparse.Namespace) -> None:
    """Train a conditional GAN on labelled pictures and write its generator."""
    classes = _classes(options)
    pictures = LabelledPictures.read(options.idx, "train", len(classes))
    settings = dataclasses.replace(loop_settings(options), betas=gan.BETAS, weight_decay=0.0)
    generator = gan.train(pictures, len(classes), settings, options.work)
    gan.write(generator, options.out)
    print(options.out)


def run_judge(options: argparse.Namespace) -> None:
    """Train the judge on real pictures and print what it says of a model's.

    Raises RequestError where the model draws pictures of another size than the data's.
    """
    classes = _classes(options)
    learned = LabelledPictures.read(options.idx, "train", len(classes))
    tested = LabelledPictures.read(options.idx, "test", len(classes))
    drawn, how = _drawn(options, classes, tested.labels)
    if drawn.shape != tested.images.shape:
        sides = drawn.shape[1], tested.images.shape[1]
        raise RequestError(
            f"the model draws pictures of {sides[0]} pixels, and those of {options.idx} have "
            f"{sides[1]}; give the data that it was trained on"
        )
    settings = dataclasses.replace(loop_settings(options), warmup_steps=judge.SETTINGS.warmup_steps)
    referee = judge.train(learned, len(classes), settings, options.work)
    report = judge.evaluate(referee, drawn, learned, tested)
    if options.picture:
        save_grid(judge.grid(drawn, tested.labels), options.picture)
    print(json.dumps({"drawing": how, **report}, indent=2))


def _drawn(
    options: argparse.Namespace, classes: list[str], labels: np.ndarray
) -> tuple[np.ndarray, dict[str, object]]:
    """Draw a picture of each label (n,); return (n, side, side) uint8, and how it was done."""
    if options.gan:
        generator = gan.read(options.gan, len(classes))
        return gan.draw(generator, labels, options.seed), {"seed": options.seed}
    how = {
        "sampler": options.sampler,
        "num_inference_steps": options.sampler_steps,
        "guidance_scale": options.guidance_scale,
    }
    pipeline = Pipeline.load(options.model)
    drawn = judge.draw(pipeline, [classes[label] for label in labels], options.seed, **how)
    return drawn, {**how, "seed": options.seed}


def _classes(options: argparse.Namespace) -> list[str]:
    """Return the classes' names; raises RequestError for names that are empty or alike."""
    classes = [name.strip() for name in options.classes.split(",")]
    if not all(classes) or len({name.lower() for name in classes}) < len(classes):
        raise RequestError(
            f"--classes is {options.classes!r}; give a name for each label, no two alike"
        )
    return classes
