"""`python -m training`: make the model that ships, or one from your own captioned pictures.

data, autoencoder, diffusion and ship are run in this order over one working folder, by `all` too;
preview adds a tiny decoder, few-steps a LoRA that draws in 4 calls, control one on edges.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import USER_ERROR, RequestError, exit_status, install, libraries_of

try:
    import torch
except ModuleNotFoundError:
    needs = "training needs torch, which is not installed"
    print(f"error: {needs}; {install('torch', 'train')}", file=sys.stderr)
    sys.exit(USER_ERROR)

import numpy as np

from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from runtime import Pipeline
from runtime.conditioning.tokenizer import Tokenizer
from training import (
    autoencoder,
    card,
    control,
    ddpm,
    diffusion,
    distillation,
    judge,
    pictograms,
    preview,
    quality,
    ship,
)
from training.captions import read_coco, read_flickr30k
from training.dataset import PictogramTrainingSet, TrainingSet, load_training_set
from training.idx import LabelledPictures
from training.loop import LoopSettings
from training.options import DEFAULTS, parser
from training.vocabulary import cut_vocabulary, download_merges, write_tokenizer

MOVED = 3  # copies of each picture that are moved a little, where encoding them takes seconds
AUTOENCODER_SHARE = 0.3  # of the minutes of `all`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    return exit_status(
        lambda: _run(parser(COMMANDS, __doc__).parse_args(arguments)),
        cancelled="stopped; the last checkpoint is kept, run the command again",
    )


def _run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    with libraries_of("train"):
        options.command(options)


def _data(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    out = options.work / "data.npz"
    if (options.coco or options.flickr30k) and options.images is None:
        raise RequestError("the captions came without their pictures; give --images FOLDER")
    if options.coco:
        read_coco(options.coco, options.images, pictograms.SIZE).save(out)
    elif options.flickr30k:
        read_flickr30k(options.flickr30k, options.images, pictograms.SIZE).save(out)
    else:
        subjects = pictograms.build(
            options.work / "packages",
            everyday=not options.all,
            progress=lambda names: tqdm(list(names), desc="subjects"),
        )
        subjects.save(out)
    print(f"{out}: {len(load_training_set(out).images)} pictures to train on")


def _autoencoder(options: argparse.Namespace) -> None:
    data = _training_set(options)
    images = data.images
    settings = dataclasses.replace(_settings(options), muon=True)
    trained = autoencoder.train(images, settings, options.work, draws=data.draws)
    sample = images[:: max(len(images) // 256, 1)]
    value = autoencoder.psnr(sample, autoencoder.reconstruct(trained, sample))
    autoencoder.normalise(trained, images)
    torch.save(trained.cpu().state_dict(), options.work / "autoencoder-final.pt")
    _record(options, "autoencoder", psnr=round(value, 2), pictures=len(sample))
    print(f"reconstruction PSNR {value:.2f} dB")


def _diffusion(options: argparse.Namespace) -> None:
    data = _training_set(options)
    start = _begin_from(options) if options.start else None
    trained = _load_autoencoder(options)
    settings = dataclasses.replace(_settings(options), muon=True, weight_decay=0.2)
    tokenizer = _tokenizer(options, data)
    denoiser = diffusion.train(
        _examples(data, trained.to(settings.device), settings.seed),
        tokenizer,
        trained,
        settings,
        options.work,
        prompts=data.prompts,
        start=start,
    )
    torch.save(denoiser.cpu().state_dict(), options.work / "diffusion-final.pt")
    _record(options, "diffusion")


def _examples(data: TrainingSet, trained: Autoencoder, seed: int) -> diffusion.Examples:
    """Encode the pictures, and on a GPU, which does it in seconds, moved ones too."""
    rng, count = np.random.default_rng(seed), len(data.images)
    copies = [data.images]
    if next(trained.parameters()).is_cuda:
        copies += [autoencoder.moved(data.images, rng) for _ in range(MOVED)]
    return diffusion.Examples(
        latents=torch.cat([autoencoder.encode(trained, images) for images in copies]),
        caption=lambda index, rng: data.caption(index % count, rng),
        draws=None if data.draws is None else np.tile(data.draws, len(copies)),
    )


def _preview(options: argparse.Namespace) -> None:
    data, settings = _training_set(options), _settings(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    decoded = preview.examples(data, denoiser, trained, tokenizer, settings.seed)
    print(preview.write(preview.train(decoded, settings, options.work), options.out))


def _control(options: argparse.Namespace) -> None:
    data, settings = _training_set(options), _settings(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    made = control.train(data, denoiser, trained, tokenizer, settings, options.work)
    control.write(made.cpu(), options.out)
    print(options.out)


def _few_steps(options: argparse.Namespace) -> None:
    data = _training_set(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    settings = _settings(options)
    denoiser.to(settings.device)
    taught = distillation.trajectories(
        data,
        denoiser,
        tokenizer,
        options.work / "trajectories",
        count=options.pictures,
        size=(trained.config.latent_channels, ship.LATENT_SIDE, ship.LATENT_SIDE),
        device=settings.device,
        seed=settings.seed,
    )
    student = distillation.train(taught, denoiser, trained, settings, options.work)
    distillation.write(student.cpu(), options.out)
    print(options.out)


def _ship(options: argparse.Namespace) -> None:
    state = _final_state(options, "diffusion")
    tokenizer = Tokenizer.load(options.work / "tokenizer")
    denoiser = diffusion.Denoiser(tokenizer.vocab_size)
    denoiser.load_state_dict(state)
    ship.write_model(options.out, denoiser, _load_autoencoder(options), options.work / "tokenizer")
    card.write_card(options.out, options.work)
    print(options.out)


def _all(options: argparse.Namespace) -> None:
    """Run every command that has not come to its end yet."""
    if not (options.work / "data.npz").exists():
        _data(options)
    for name, run, share in (
        ("autoencoder", _autoencoder, AUTOENCODER_SHARE),
        ("diffusion", _diffusion, 1 - AUTOENCODER_SHARE),
    ):
        if (options.work / f"{name}-final.pt").exists():
            continue
        _, steps, batch_size, rate, gpu_batch_size = DEFAULTS[name]
        asked = {
            "steps": steps,
            "minutes": options.minutes * share,
            "batch_size": batch_size if options.device == "cpu" else gpu_batch_size,
            "learning_rate": rate,
        }
        run(argparse.Namespace(**vars(options) | asked))
    _ship(options)


def _evaluate(options: argparse.Namespace) -> None:
    data = _training_set(options)
    if not isinstance(data, PictogramTrainingSet):
        raise RequestError(
            f"{options.work / 'data.npz'} holds captioned pictures, of which none is held out; "
            "evaluate measures pictograms: run `python -m training data` without captions"
        )
    if options.control:
        report = control.evaluate(options.model, options.control, data.pictograms)
        found = {name: report[name] for name in ("f1", "f1_without", "gain")}
    else:
        report = quality.evaluate(options.model, data.pictograms, few_steps=options.few_steps)
        found = quality.figures(report)
    path = options.work / ("control.json" if options.control else "quality.json")
    ship.write_json(path, report)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))


def _begin_from(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Take tokenizer and autoencoder of a model into the working folder; return its denoiser."""
    folder = find_model(options.start)
    denoiser, trained = ship.read_model(folder)
    torch.save(trained, options.work / "autoencoder-final.pt")
    shutil.copytree(folder / "tokenizer", options.work / "tokenizer", dirs_exist_ok=True)
    return denoiser


def _read_model(folder: Path) -> tuple[diffusion.Denoiser, Autoencoder, Tokenizer]:
    """Return a model that `ship` wrote as modules, to go on from."""
    denoiser_state, autoencoder_state = ship.read_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    denoiser = diffusion.Denoiser(tokenizer.vocab_size).eval()
    denoiser.load_state_dict(denoiser_state)
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(autoencoder_state)
    return denoiser, trained, tokenizer


def _training_set(options: argparse.Namespace) -> TrainingSet:
    return load_training_set(options.work / "data.npz")


def _load_autoencoder(options: argparse.Namespace) -> Autoencoder:
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(_final_state(options, "autoencoder"))
    trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    return trained


def _final_state(options: argparse.Namespace, command: str) -> dict[str, torch.Tensor]:
    path = options.work / f"{command}-final.pt"
    if not path.exists():
        raise RequestError(f"there is no {path}; run `python -m training {command}` to its end")
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _record(options: argparse.Namespace, command: str, **measured: float) -> None:
    """Note how a training was asked for and what came of it, for the model's card."""
    names = (
        "start", "steps", "minutes", "batch_size", "learning_rate", "device", "seed", "vocab_size",
    )  # fmt: skip
    asked = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    ship.write_json(options.work / f"{command}.json", {"options": asked, **measured})


def _tokenizer(options: argparse.Namespace, data: TrainingSet) -> Tokenizer:
    folder = options.work / "tokenizer"
    if not (folder / "vocab.json").exists():
        merges = download_merges(options.work / "packages")
        vocabulary, kept = cut_vocabulary(data.vocabulary_texts(), options.vocab_size, merges)
        write_tokenizer(folder, vocabulary, kept, diffusion.MAX_TOKENS)
    return Tokenizer.load(folder)


def _settings(options: argparse.Namespace) -> LoopSettings:
    if options.threads:
        torch.set_num_threads(options.threads)
    return LoopSettings(
        steps=options.steps,
        minutes=options.minutes,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        device=options.device,
        seed=options.seed,
        sample_steps=options.sample_steps,
    )


def _ddpm(options: argparse.Namespace) -> None:
    classes = _classes(options)
    pictures = LabelledPictures.read(options.idx, "train", len(classes))
    config = ddpm.scheduler(options.beta_schedule, options.prediction)
    folder = options.work / "tokenizer"
    settings = dataclasses.replace(_settings(options), muon=True, weight_decay=0.1)
    tokenizer = ddpm.class_tokenizer(folder, classes)
    denoiser = ddpm.train(
        pictures, tokenizer, classes, settings, options.work, config=config, loss=options.loss
    )
    ddpm.write(options.out, denoiser.cpu(), folder, config, pictures.images.shape[1])
    print(f"{options.out}; make its graphs with `python -m export {options.out}`")


def _judge(options: argparse.Namespace) -> None:
    classes = _classes(options)
    learned = LabelledPictures.read(options.idx, "train", len(classes))
    tested = LabelledPictures.read(options.idx, "test", len(classes))
    pipeline = Pipeline.load(options.model)
    settings = dataclasses.replace(_settings(options), warmup_steps=50)
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


COMMANDS = {
    "data": _data,
    "autoencoder": _autoencoder,
    "diffusion": _diffusion,
    "preview": _preview,
    "control": _control,
    "few-steps": _few_steps,
    "all": _all,
    "ship": _ship,
    "evaluate": _evaluate,
    "ddpm": _ddpm,
    "judge": _judge,
}

if __name__ == "__main__":
    sys.exit(main())
