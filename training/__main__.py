"""`python -m training`: make the model that ships, or one from your own captioned pictures.

data, autoencoder, diffusion and ship are run in this order over one working folder; preview adds
a tiny decoder to a model.
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

from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder, card, diffusion, pictograms, preview, quality, ship
from training.captions import read_coco, read_flickr30k
from training.dataset import PictogramTrainingSet, TrainingSet, load_training_set
from training.loop import LoopSettings
from training.vocabulary import cut_vocabulary, download_merges, write_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    return exit_status(
        lambda: _run(_parser().parse_args(arguments)),
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
    images = _training_set(options).images
    trained = autoencoder.train(images, _settings(options), options.work)
    sample = images[:: max(len(images) // 256, 1)]
    value = autoencoder.psnr(sample, autoencoder.reconstruct(trained, sample))
    autoencoder.normalise(trained, images)
    torch.save(trained.state_dict(), options.work / "autoencoder-final.pt")
    _record(options, "autoencoder", psnr=round(value, 2), pictures=len(sample))
    print(f"reconstruction PSNR {value:.2f} dB")


def _diffusion(options: argparse.Namespace) -> None:
    data = _training_set(options)
    start = _begin_from(options) if options.start else None
    trained = _load_autoencoder(options)
    examples = diffusion.Examples(
        latents=autoencoder.encode(trained, data.images), caption=data.caption
    )
    tokenizer = _tokenizer(options, data)
    denoiser = diffusion.train(
        examples,
        tokenizer,
        trained,
        dataclasses.replace(_settings(options), muon=True),
        options.work,
        prompts=data.prompts,
        start=start,
    )
    torch.save(denoiser.state_dict(), options.work / "diffusion-final.pt")
    _record(options, "diffusion")


def _preview(options: argparse.Namespace) -> None:
    data, folder = _training_set(options), find_model(options.model)
    denoiser_state, autoencoder_state = ship.read_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    denoiser = diffusion.Denoiser(tokenizer.vocab_size).eval()
    denoiser.load_state_dict(denoiser_state)
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(autoencoder_state)
    settings = _settings(options)
    decoded = preview.examples(data, denoiser, trained, tokenizer, settings.seed)
    print(preview.write(preview.train(decoded, settings, options.work), options.out))


def _ship(options: argparse.Namespace) -> None:
    state = _final_state(options, "diffusion")
    tokenizer = Tokenizer.load(options.work / "tokenizer")
    denoiser = diffusion.Denoiser(tokenizer.vocab_size)
    denoiser.load_state_dict(state)
    ship.write_model(options.out, denoiser, _load_autoencoder(options), options.work / "tokenizer")
    card.write_card(options.out, options.work)
    print(options.out)


def _evaluate(options: argparse.Namespace) -> None:
    data = _training_set(options)
    if not isinstance(data, PictogramTrainingSet):
        raise RequestError(
            f"{options.work / 'data.npz'} holds captioned pictures, of which none is held out; "
            "evaluate measures pictograms: run `python -m training data` without captions"
        )
    report = quality.evaluate(options.model, data.pictograms)
    ship.write_json(options.work / "quality.json", report)
    print(json.dumps(report, indent=2))


def _begin_from(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Take tokenizer and autoencoder of a model into the working folder; return its denoiser."""
    folder = find_model(options.start)
    denoiser, trained = ship.read_model(folder)
    torch.save(trained, options.work / "autoencoder-final.pt")
    shutil.copytree(folder / "tokenizer", options.work / "tokenizer", dirs_exist_ok=True)
    return denoiser


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
        "start", "steps", "minutes", "batch_size", "learning_rate", "seed", "vocab_size",
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument(
            "--work", type=Path, default=Path("work"), help="working folder (default: %(default)s)"
        )
        added.set_defaults(command=run)
        return added

    data = command("data", _data, "make the data set: pictograms, or your own captioned pictures")
    data.add_argument("--all", action="store_true", help="all subjects, not the everyday ones")
    source = data.add_mutually_exclusive_group()
    source.add_argument("--coco", type=Path, metavar="JSON", help="captions as COCO has them")
    source.add_argument("--flickr30k", type=Path, metavar="FILE", help="captions as Flickr30k has")
    data.add_argument("--images", type=Path, metavar="FOLDER", help="the pictures they describe")

    for name, run, text, steps, batch, rate in (
        ("autoencoder", _autoencoder, "train the autoencoder", 30_000, 16, 2e-3),
        ("diffusion", _diffusion, "train text encoder and UNet", 100_000, 48, 3e-3),
        ("preview", _preview, "distil a model's tiny decoder for previews", 5000, 8, 5e-3),
    ):
        train = command(name, run, text)
        train.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
        train.add_argument("--minutes", type=float, help="end sooner, after this much computing")
        train.add_argument("--batch-size", type=int, default=batch, help="(default: %(default)s)")
        train.add_argument(
            "--learning-rate", type=float, default=rate, help="(default: %(default)s)"
        )
        train.add_argument("--sample-steps", type=int, default=1000, help="between sample grids")
        train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        train.add_argument("--threads", type=int, help="processor threads")
        train.add_argument("--seed", type=int, default=0)
        if name == "preview":
            train.add_argument("--model", default="pictogram", help="(default: %(default)s)")
            train.add_argument(
                "--out", type=Path, required=True, help="the folder to put preview_decoder/ into"
            )
        if name == "diffusion":
            train.add_argument(
                "--start", metavar="MODEL", help="train on from this model, with its autoencoder"
            )
            train.add_argument(
                "--vocab-size", type=int, default=2560, help="(default: %(default)s)"
            )

    shipping = command("ship", _ship, "write the trained model in diffusers' layout")
    shipping.add_argument("--out", type=Path, required=True, help="the model's folder")
    evaluate = command("evaluate", _evaluate, "measure the held-out match of a model")
    evaluate.add_argument("--model", default="pictogram")
    return parser


if __name__ == "__main__":
    sys.exit(main())
