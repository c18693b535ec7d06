"""`python -m training upsampler` and `evaluate-upsampler`: a second stage, and what it gains."""

import argparse
import dataclasses
import json

import numpy as np
import torch

from engine.configs.upsampler import STEPS, UpsamplerConfig
from engine.errors import RequestError
from runtime.images.upsampling import Sampling
from training import pictograms, upsampler
from training.diffusers_folder import save_whole, write_json
from training.mobilenet import MobileNet
from training.options import loop_settings
from training.pictograms import Pictograms
from training.upsampler_networks import one_pass_config
from training.upsampler_quality import evaluate

PICTURES = "pictograms-256.npz"  # in the working folder
WATCHED = 12  # held-out pictures whose PSNR is printed on the way
UPSAMPLER, ONE_PASS = "upsampler-{}x.safetensors", "one-pass-{}x.safetensors"
PREFIX = "upsampler."


def run_upsampler(options: argparse.Namespace) -> None:
    """Train both networks of a scale and write their files."""
    images, held_out = upsampler.split(_pictures(options))
    watched = held_out[:: max(len(held_out) // WATCHED, 1)][:WATCHED]
    scale = options.scale
    config = UpsamplerConfig(block_out_channels=upsampler.WIDTHS[scale], upscale=scale)
    settings = dataclasses.replace(loop_settings(options), muon=True)
    unet = upsampler.train_diffusion(images, watched, config, settings, options.work)
    state = {f"{PREFIX}{name}": value for name, value in unet.state_dict().items()}
    save_whole(state, options.out / UPSAMPLER.format(scale))
    compact = one_pass_config(config, STEPS)
    network = upsampler.train_one_pass(images, watched, compact, settings, options.work)
    save_whole(network.state_dict(), options.out / ONE_PASS.format(scale))
    for name in (UPSAMPLER, ONE_PASS):
        print(options.out / name.format(scale))


def run_evaluate_upsampler(options: argparse.Namespace) -> None:
    """Print what the files of a scale make of pictures of unseen subjects; raises RequestError."""
    from tqdm import tqdm

    if options.threads:
        torch.set_num_threads(options.threads)
    _, originals = upsampler.split(_pictures(options))
    if not 1 <= options.pictures <= len(originals):
        raise RequestError(
            f"--pictures is {options.pictures}; {len(originals)} are held out, give 1 to that many"
        )
    chosen = originals[np.linspace(0, len(originals) - 1, options.pictures).round().astype(int)]
    report = evaluate(
        options.out / UPSAMPLER.format(options.scale),
        options.out / ONE_PASS.format(options.scale),
        chosen,
        MobileNet.load(options.work / "packages"),
        sampling=Sampling(
            num_inference_steps=options.sampler_steps, noise_level=options.noise_level
        ),
        threads=options.threads,
        progress=lambda each, name: tqdm(each, desc=name, mininterval=5),
    )
    write_json(options.work / f"upsampler-{options.scale}x.json", report)
    print(json.dumps(report, indent=2))


def _pictures(options: argparse.Namespace) -> Pictograms:
    """Return the pictograms in their larger size, drawn once."""
    from tqdm import tqdm

    path = options.work / PICTURES
    if not path.exists():
        pictograms.build(
            options.work / "packages",
            everyday=not options.all,
            size=upsampler.SIZE,
            progress=lambda names: tqdm(list(names), desc="subjects"),
        ).save(path)
    return Pictograms.load(path)
