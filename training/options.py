"""The options of `python -m training`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.command_line import CommandParser
from training.ddpm import LOSSES, PREDICTIONS, SCHEDULES
from training.idx import DIGITS
from training.loop import LoopSettings
from training.lora import NAMINGS
from training.text_encoders import KINDS

Run = Callable[[argparse.Namespace], None]

# What a training is asked for by default: text, steps, batch size, learning rate, batch on a GPU.
DEFAULTS = {
    "autoencoder": ("train the autoencoder", 30_000, 16, 2e-3, 192),
    "diffusion": ("train text encoder and UNet", 100_000, 48, 3e-3, 512),
    "finish": ("sharpen a model's decoder against a discriminator", 4000, 16, 5e-4, 96),
    "preview": ("distil a model's tiny decoder for previews", 5000, 8, 5e-3, 8),
    "control": ("train a control on the edges of pictures", 20_000, 32, 1e-3, 256),
    "few-steps": ("distil a LoRA that draws in 4 calls without guidance", 6000, 64, 2e-3, 512),
}


def parser(runs: Mapping[str, Run], description: str | None) -> argparse.ArgumentParser:
    """Return the program's parser; `runs` has the function of each command by its name."""
    program = CommandParser(prog="python -m training", description=description)
    commands = program.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument(
            "--work", type=Path, default=Path("work"), help="working folder (default: %(default)s)"
        )
        added.set_defaults(command=runs[name])
        return added

    def sources(data: argparse.ArgumentParser) -> None:
        data.add_argument("--all", action="store_true", help="all subjects, not the everyday ones")
        source = data.add_mutually_exclusive_group()
        source.add_argument("--coco", type=Path, metavar="JSON", help="captions as COCO has them")
        source.add_argument(
            "--flickr30k", type=Path, metavar="FILE", help="captions as Flickr30k has them"
        )
        source.add_argument(
            "--shards", type=Path, nargs="+", metavar="TAR", help="tar files, or a folder of them"
        )
        data.add_argument(
            "--images",
            type=Path,
            metavar="FOLDER",
            help="the pictures they describe; alone, with .txt files or metadata.jsonl in it",
        )

    def machine(train: argparse.ArgumentParser) -> None:
        train.add_argument("--sample-steps", type=int, default=1000, help="between sample grids")
        train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        train.add_argument("--threads", type=int, help="processor threads")
        train.add_argument("--seed", type=int, default=0)

    def vocabulary(train: argparse.ArgumentParser) -> None:
        train.add_argument("--vocab-size", type=int, default=2560, help="(default: %(default)s)")

    sources(command("data", "make the data set: pictograms, or your own captioned pictures"))
    for name, (text, steps, batch, rate, _) in DEFAULTS.items():
        train = command(name, text)
        train.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
        train.add_argument("--minutes", type=float, help="end sooner, after this much computing")
        train.add_argument("--batch-size", type=int, default=batch, help="(default: %(default)s)")
        train.add_argument(
            "--learning-rate", type=float, default=rate, help="(default: %(default)s)"
        )
        machine(train)
        if name in ("finish", "preview", "control", "few-steps"):
            train.add_argument("--model", default="pictogram", help="(default: %(default)s)")
        if name == "finish":
            train.add_argument("--out", type=Path, required=True, help="the folder for vae/")
        if name == "preview":
            train.add_argument(
                "--out", type=Path, required=True, help="the folder to put preview_decoder/ into"
            )
        if name == "control":
            train.add_argument("--out", type=Path, required=True, help="the control, .safetensors")
        if name == "few-steps":
            train.add_argument("--out", type=Path, required=True, help="the LoRA, .safetensors")
            train.add_argument(
                "--pictures",
                type=int,
                default=12_000,
                help="that the model draws for it to learn from (default: %(default)s)",
            )
        if name == "diffusion":
            train.add_argument(
                "--start", metavar="MODEL", help="train on from this model, with its autoencoder"
            )
            vocabulary(train)
            train.add_argument(
                "--text-encoder",
                choices=KINDS,
                default="clip",
                help="what reads the text; minilm is trained and stays so (default: %(default)s)",
            )
            train.add_argument(
                "--unseen-synonyms",
                action="store_true",
                help="leave words out of the captions that `synonyms` asks for",
            )
    _add_classes(command)
    _add_tuning(command)
    _add_search(command)
    _add_upsampler(command)
    everything = command("all", "data, autoencoder, diffusion and ship, what is not done yet")
    sources(everything)
    everything.add_argument(
        "--minutes", type=float, required=True, help="of computing, for both trainings together"
    )
    everything.add_argument("--out", type=Path, required=True, help="the model's folder")
    everything.set_defaults(start=None, text_encoder="clip", unseen_synonyms=False)
    machine(everything)
    vocabulary(everything)

    shipping = command("ship", "write the trained model in diffusers' layout")
    shipping.add_argument("--out", type=Path, required=True, help="the model's folder")
    evaluate = command("evaluate", "measure the held-out match of a model")
    evaluate.add_argument("--model", default="pictogram")
    evaluate.add_argument(
        "--few-steps", type=Path, metavar="LORA", help="what few-steps wrote, to draw in 4 steps"
    )
    evaluate.add_argument(
        "--control",
        type=Path,
        metavar="FILE",
        help="what control wrote: measure how far pictures follow edges with it and without",
    )
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")
    synonyms = command("synonyms", "measure a model by words that no caption had")
    synonyms.add_argument("--model", required=True, help="trained with --unseen-synonyms, exported")
    synonyms.add_argument("--seeds", type=int, default=4, help="pictures of a word")
    return program


def loop_settings(options: argparse.Namespace) -> LoopSettings:
    """Return what the options say of the optimisation; raises RequestError."""
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


def _add_classes(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the model in pixels, the GAN beside it, and their judge."""
    ddpm = command("ddpm", "train a small model in pixels on labelled pictures")
    gan = command("gan", "train a conditional GAN of the same size on the same pictures")
    judging = command("judge", "measure what ddpm or gan wrote")
    for added, steps, rate in ((ddpm, 3600, 2e-3), (gan, 3000, 1e-3), (judging, 800, 2e-3)):
        added.add_argument(
            "--idx", type=Path, required=True, metavar="FOLDER", help="of MNIST's four IDX files"
        )
        added.add_argument(
            "--classes",
            default=",".join(DIGITS),
            metavar="NAME,NAME",
            help="of the labels from 0 on; prompts for them (default: %(default)s)",
        )
        added.add_argument("--seed", type=int, default=0)
        added.add_argument("--threads", type=int, help="processor threads")
        added.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        added.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
        added.add_argument("--minutes", type=float, help="end sooner, after this much computing")
        added.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
        added.add_argument(
            "--learning-rate", type=float, default=rate, help="(default: %(default)s)"
        )
        added.set_defaults(sample_steps=1000)
    ddpm.add_argument("--beta-schedule", choices=SCHEDULES, default="cosine")
    ddpm.add_argument("--loss", choices=LOSSES, default="l2")
    ddpm.add_argument("--prediction", choices=PREDICTIONS, default=PREDICTIONS[0])
    ddpm.add_argument(
        "--compare",
        action="store_true",
        help="train every schedule with --loss and every loss with --beta-schedule, judge them, "
        "and write a table",
    )
    ddpm.add_argument("--out", type=Path, required=True, help="the model's folder, or the models'")
    gan.add_argument("--out", type=Path, required=True, help="the generator, .safetensors")
    drawn = judging.add_mutually_exclusive_group(required=True)
    drawn.add_argument("--model", type=Path, help="what ddpm wrote, exported")
    drawn.add_argument("--gan", type=Path, metavar="FILE", help="what gan wrote")
    judging.add_argument("--picture", type=Path, metavar="PNG", help="also show some of them here")
    judging.add_argument("--sampler", default="ddpm", help="(default: %(default)s)")
    judging.add_argument("--guidance-scale", type=float, default=1.0, help="(default: %(default)s)")
    for added in (judging, ddpm):
        added.add_argument(
            "--sampler-steps", type=int, default=50, help="to judge by (default: %(default)s)"
        )


def _add_search(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the search of hyper-parameters."""
    added = command("search", "find hyper-parameters of diffusion, beside random ones")
    added.add_argument(
        "--model", default="pictogram", help="whose autoencoder and tokens (default: %(default)s)"
    )
    for name, default, text in (
        ("minutes", 12.0, "of training for each search"),
        ("trial-minutes", 1.5, "of a trial that is not ended early"),
        ("final-minutes", 5.0, "of the training with the best parameters, and of the default's"),
    ):
        added.add_argument(
            f"--{name}", type=float, default=default, help=f"{text} (default: %(default)s)"
        )
    added.add_argument("--seeds", type=int, default=3, help="of each search (default: %(default)s)")
    added.add_argument("--trials", type=int, help="at most in a search")
    added.add_argument("--trial-steps", type=int, help="end a trial sooner, after so many steps")
    added.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    added.add_argument("--threads", type=int, help="processor threads")


def _add_upsampler(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the second stage, which enlarges pictures, and its measure."""
    train = command("upsampler", "train networks that enlarge pictograms, by diffusion and at once")
    measure = command("evaluate-upsampler", "measure what upsampler wrote beside Lanczos' kernel")
    for added in (train, measure):
        added.add_argument("--scale", type=int, choices=(2, 4), default=2, help="128 or 64 to 256")
        added.add_argument("--all", action="store_true", help="all subjects, not the everyday ones")
        added.add_argument("--threads", type=int, help="processor threads")
        added.add_argument("--out", type=Path, required=True, help="the folder for the two files")
    train.add_argument("--steps", type=int, default=40_000, help="(default: %(default)s)")
    train.add_argument("--minutes", type=float, help="end sooner, after this much of each network")
    train.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    train.add_argument("--sample-steps", type=int, default=1000, help="between PSNRs printed")
    train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0)
    measure.add_argument("--sampler-steps", type=int, default=4, help="(default: %(default)s)")
    measure.add_argument("--noise-level", type=int, default=0, help="(default: %(default)s)")
    measure.add_argument("--pictures", type=int, default=240, help="(default: %(default)s)")


def _add_tuning(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the trainings that begin with a Stable Diffusion of someone's."""
    lora = command("lora", "train a LoRA of a Stable Diffusion on captioned pictures")
    whole = command("fine-tune", "train a Stable Diffusion on with captioned pictures")
    for added, rate in ((lora, 1e-4), (whole, 1e-5)):
        added.add_argument("--model", required=True, help="a checkpoint file, or a model's folder")
        source = added.add_mutually_exclusive_group(required=True)
        source.add_argument(
            "--images", type=Path, metavar="FOLDER", help="with .txt files or metadata.jsonl in it"
        )
        source.add_argument(
            "--shards", type=Path, nargs="+", metavar="TAR", help="tar files, or a folder of them"
        )
        added.add_argument("--prompt", help="caption of pictures that have none")
        added.add_argument("--size", type=int, help="of pictures in pixels (default: the model's)")
        added.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
        added.add_argument("--minutes", type=float, help="end sooner, after this much computing")
        added.add_argument("--batch-size", type=int, default=1, help="(default: %(default)s)")
        added.add_argument(
            "--learning-rate", type=float, default=rate, help="(default: %(default)s)"
        )
        added.add_argument(
            "--text-encoder", action="store_true", help="train the text encoders as well"
        )
        added.add_argument("--prediction-type", help="instead of what the model says")
        added.add_argument(
            "--min-snr-gamma", type=float, help="weigh easy timesteps less (5 is usual)"
        )
        added.add_argument("--ema", type=float, metavar="DECAY", help="average the weights (0.999)")
        added.add_argument(
            "--drop-captions", type=float, default=0.1, help="share of steps (default: %(default)s)"
        )
        added.add_argument(
            "--no-recompute", action="store_true", help="keep activations: faster, more memory"
        )
        added.add_argument(
            "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of layers"
        )
        added.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        added.add_argument("--threads", type=int, help="processor threads")
        added.add_argument("--seed", type=int, default=0)
        added.add_argument("--save-minutes", type=float, default=10, help="between checkpoints")
        added.set_defaults(sample_steps=1000)
    lora.add_argument("--rank", type=int, default=8, help="(default: %(default)s)")
    lora.add_argument("--alpha", type=float, help="scale times the rank (default: the rank)")
    lora.add_argument(
        "--layers",
        choices=("attention", "all"),
        default="attention",
        help="of the UNet: those of its transformers, or also its convolutions",
    )
    lora.add_argument("--naming", choices=NAMINGS, default="kohya", help="(default: %(default)s)")
    lora.add_argument("--out", type=Path, required=True, help="the LoRA, .safetensors")
    whole.add_argument("--out", type=Path, required=True, help="the model's folder")
