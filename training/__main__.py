"""`python -m training`: make the model that ships, or one from your own captioned pictures.

data, autoencoder, diffusion and ship are run in this order over one working folder, by `all` too;
finish sharpens a model's decoder, preview adds a tiny one, few-steps a LoRA that draws in 4 calls,
control a ControlNet that follows edges, search finds hyper-parameters.
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
from runtime.conditioning.tokenizer import Tokenizer
from training import (
    autoencoder,
    card,
    control,
    devices,
    diffusion,
    distillation,
    pictograms,
    preview,
    quality,
    ship,
    store,
    text_encoders,
)
from training.captions import read_coco, read_flickr30k, read_folder
from training.class_commands import run_ddpm, run_gan, run_judge
from training.dataset import (
    CAPTIONED,
    PICTOGRAMS,
    CaptionedTrainingSet,
    PictogramTrainingSet,
    TrainingSet,
    load_training_set,
)
from training.diffusers_folder import write_json
from training.finish_command import run_finish
from training.options import DEFAULTS, loop_settings, parser
from training.search_command import run_search
from training.shards import read_shards
from training.text_commands import TEXT_ENCODER, prepare_text, run_synonyms
from training.tuning_commands import run_fine_tune, run_lora
from training.upsampler_commands import run_evaluate_upsampler, run_upsampler

MOVED = 3  # copies of each picture that are moved a little, where encoding them takes seconds
LATENTS = "latents.npy"  # in the working folder
AUTOENCODER_SHARE = 0.3  # of the minutes of `all`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    return exit_status(
        lambda: _run(parser(COMMANDS, __doc__).parse_args(arguments)),
        cancelled="stopped; the last checkpoint is kept, run the command again",
    )


def _run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    with libraries_of("train"), devices.processes(getattr(options, "device", "cpu")) as device:
        if devices.count() > 1 and options.command not in TOGETHER:
            raise RequestError(
                "this command runs in one process; torchrun is for autoencoder, diffusion, ddpm, "
                "lora and fine-tune"
            )
        options.device = device
        options.command(options)


def _data(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    if (options.coco or options.flickr30k) and options.images is None:
        raise RequestError("the captions came without their pictures; give --images FOLDER")
    records = None
    if options.coco:
        records = read_coco(options.coco, options.images)
    elif options.flickr30k:
        records = read_flickr30k(options.flickr30k, options.images)
    elif options.shards:
        records = read_shards(options.shards)
    elif options.images:
        records = read_folder(options.images)
    if records is not None:
        (options.work / PICTOGRAMS).unlink(missing_ok=True)
        shown = tqdm(records, desc="pictures", mininterval=5)
        store.write(shown, options.work / CAPTIONED, pictograms.SIZE)
    else:
        subjects = pictograms.build(
            options.work / "packages",
            everyday=not options.all,
            progress=lambda names: tqdm(list(names), desc="subjects"),
        )
        subjects.save(options.work / PICTOGRAMS)
    print(f"{options.work}: {len(_training_set(options).images)} pictures to train on")


def _autoencoder(options: argparse.Namespace) -> None:
    data = _training_set(options)
    images = data.images
    settings = dataclasses.replace(loop_settings(options), muon=True)
    trained = autoencoder.train(images, settings, options.work, draws=data.draws)
    sample = images[:: max(len(images) // 256, 1)]
    value = autoencoder.psnr(sample, autoencoder.reconstruct(trained, sample))
    autoencoder.normalise(trained, images)
    _finish(options, "autoencoder", trained, psnr=round(value, 2), pictures=len(sample))
    print(f"reconstruction PSNR {value:.2f} dB")


def _diffusion(options: argparse.Namespace) -> None:
    data = _training_set(options)
    start = _begin_from(options) if options.start else None
    trained = _load_autoencoder(options)
    settings = dataclasses.replace(loop_settings(options), **diffusion.OPTIMISATION)
    text, frozen, tokenizer = prepare_text(options, data)
    denoiser = diffusion.train(
        _examples(options, data, trained.to(settings.device)),
        tokenizer,
        trained,
        settings,
        options.work,
        prompts=data.prompts,
        start=start,
        text=text,
        frozen=frozen,
    )
    _finish(options, "diffusion", denoiser)


def _examples(
    options: argparse.Namespace, data: TrainingSet, trained: Autoencoder
) -> diffusion.Examples:
    """Encode the pictures; pictograms on a GPU, which does it in seconds, moved as well.

    Latents of captioned pictures, of which there may be any number, are in a file.
    """
    if isinstance(data, CaptionedTrainingSet):
        path = options.work / LATENTS
        with devices.first_alone() as first:
            made_of = (options.work / CAPTIONED, options.work / "autoencoder-final.pt")
            newest = max(source.stat().st_mtime for source in made_of)
            if first and path.exists() and path.stat().st_mtime < newest:
                path.unlink()
            latents = autoencoder.encode_into(trained, data.images, path)
        return diffusion.Examples(latents=latents, captions=data.captions)
    rng, count = np.random.default_rng(options.seed), len(data.images)
    copies = [data.images]
    if next(trained.parameters()).is_cuda:
        copies += [autoencoder.moved(data.images, rng) for _ in range(MOVED)]
    return diffusion.Examples(
        latents=torch.cat([autoencoder.encode(trained, images) for images in copies]),
        captions=lambda index, rng: data.captions(index % count, rng),
        draws=None if data.draws is None else np.tile(data.draws, len(copies)),
    )


def _preview(options: argparse.Namespace) -> None:
    data, settings = _training_set(options), loop_settings(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    decoded = preview.examples(data, denoiser, trained, tokenizer, settings.seed)
    print(preview.write(preview.train(decoded, settings, options.work), options.out))


def _control(options: argparse.Namespace) -> None:
    data, settings = _training_set(options), loop_settings(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    made = control.train(data, denoiser, trained, tokenizer, settings, options.work)
    control.write(made.cpu(), options.out)
    print(options.out)


def _few_steps(options: argparse.Namespace) -> None:
    data = _training_set(options)
    denoiser, trained, tokenizer = _read_model(find_model(options.model))
    settings = loop_settings(options)
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
    other = options.work / TEXT_ENCODER
    text = text_encoders.read_config(other) if other.exists() else None
    denoiser = diffusion.Denoiser(tokenizer.vocab_size, text=text)
    denoiser.load_state_dict(state)
    ship.write_model(options.out, denoiser, _load_autoencoder(options), options.work / "tokenizer")
    card.write_card(options.out, options.work)
    print(options.out)


def _all(options: argparse.Namespace) -> None:
    """Run every command that has not come to its end yet."""
    if not any((options.work / name).exists() for name in (PICTOGRAMS, CAPTIONED)):
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
            f"{options.work} holds captioned pictures, of which none is held out; "
            "evaluate measures pictograms: run `python -m training data` without captions"
        )
    if options.control:
        report = control.evaluate(options.model, options.control, data.pictograms)
        found = {name: report[name] for name in ("f1", "f1_without", "gain")}
    else:
        report = quality.evaluate(options.model, data.pictograms, few_steps=options.few_steps)
        found = quality.figures(report)
    write_json(options.work / ("control.json" if options.control else "quality.json"), report)
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
    text = text_encoders.read_config(folder / "text_encoder" / "config.json")
    denoiser = diffusion.Denoiser(tokenizer.vocab_size, text=text).eval()
    denoiser.load_state_dict(denoiser_state)
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(autoencoder_state)
    return denoiser, trained, tokenizer


def _training_set(options: argparse.Namespace) -> TrainingSet:
    hidden = getattr(options, "unseen_synonyms", False)
    return load_training_set(options.work, without_synonyms=hidden)


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


def _finish(
    options: argparse.Namespace, command: str, trained: torch.nn.Module, **measured: float
) -> None:
    """Write what was trained, and a record of it."""
    if devices.is_first():
        torch.save(trained.cpu().state_dict(), options.work / f"{command}-final.pt")
        _record(options, command, **measured)


def _record(options: argparse.Namespace, command: str, **measured: float) -> None:
    """Note how a training was asked for and what came of it, for the model's card."""
    names = (
        "start", "steps", "minutes", "batch_size", "learning_rate", "device", "seed", "vocab_size",
    )  # fmt: skip
    asked = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    write_json(options.work / f"{command}.json", {"options": asked, **measured})


COMMANDS = {
    "data": _data,
    "autoencoder": _autoencoder,
    "diffusion": _diffusion,
    "finish": run_finish,
    "preview": _preview,
    "control": _control,
    "few-steps": _few_steps,
    "all": _all,
    "ship": _ship,
    "evaluate": _evaluate,
    "synonyms": run_synonyms,
    "ddpm": run_ddpm,
    "gan": run_gan,
    "judge": run_judge,
    "search": run_search,
    "lora": run_lora,
    "fine-tune": run_fine_tune,
    "upsampler": run_upsampler,
    "evaluate-upsampler": run_evaluate_upsampler,
}

# What torchrun may start several processes of.
TOGETHER = (_autoencoder, _diffusion, run_ddpm, run_lora, run_fine_tune)

if __name__ == "__main__":
    sys.exit(main())
