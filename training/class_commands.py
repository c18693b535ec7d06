"""`python -m training ddpm` and `judge`: a small model in pixels of classes, and its measure."""

import argparse
import dataclasses
import json

from engine.errors import RequestError
from runtime import Pipeline
from training import ddpm, judge
from training.idx import LabelledPictures
from training.options import loop_settings


def run_ddpm(options: argparse.Namespace) -> None:
    """Train on labelled pictures and write the model."""
    classes = _classes(options)
    pictures = LabelledPictures.read(options.idx, "train", len(classes))
    config = ddpm.scheduler(options.beta_schedule, options.prediction)
    folder = options.work / "tokenizer"
    settings = dataclasses.replace(loop_settings(options), muon=True, weight_decay=0.1)
    tokenizer = ddpm.class_tokenizer(folder, classes)
    denoiser = ddpm.train(
        pictures, tokenizer, classes, settings, options.work, config=config, loss=options.loss
    )
    ddpm.write(options.out, denoiser.cpu(), folder, config, pictures.images.shape[1])
    print(f"{options.out}; make its graphs with `python -m export {options.out}`")


def run_judge(options: argparse.Namespace) -> None:
    """Train the judge on real pictures and print what it says of a model's."""
    classes = _classes(options)
    learned = LabelledPictures.read(options.idx, "train", len(classes))
    tested = LabelledPictures.read(options.idx, "test", len(classes))
    pipeline = Pipeline.load(options.model)
    settings = dataclasses.replace(loop_settings(options), warmup_steps=50)
    report = judge.evaluate(
        pipeline,
        judge.train(learned, len(classes), settings, options.work),
        learned,
        tested,
        classes,
        seed=options.seed,
        sampler=options.sampler,
        num_inference_steps=options.sampler_steps,
        guidance_scale=options.guidance_scale,
    )
    print(json.dumps(report, indent=2))


def _classes(options: argparse.Namespace) -> list[str]:
    """Return the classes' names; raises RequestError for names that are empty or alike."""
    classes = [name.strip() for name in options.classes.split(",")]
    if not all(classes) or len({name.lower() for name in classes}) < len(classes):
        raise RequestError(
            f"--classes is {options.classes!r}; give a name for each label, no two alike"
        )
    return classes
