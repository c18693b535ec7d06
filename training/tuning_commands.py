"""`python -m training lora` and `fine-tune`: a Stable Diffusion of someone's, trained on."""

import argparse
import dataclasses
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from engine.errors import RequestError
from engine.model import Model, find_model
from runtime.conditioning.tokenizer import load_tokenizers
from training import devices, encoded, stable_diffusion
from training.captions import read_folder
from training.diffusers_folder import write_json
from training.loop import Loop
from training.lora import write_lora
from training.options import loop_settings
from training.shards import read_shards
from training.stable_diffusion import StableDiffusion, TuningSettings
from training.tuned_folder import write_tuned

ENCODED = "encoded"  # in the working folder


def run_lora(options: argparse.Namespace) -> None:
    """Train a LoRA and write it; raises RequestError for what cannot be trained."""
    if options.rank < 1:
        raise RequestError(f"--rank is {options.rank}; give a number from 1 on")
    model, tuning, data = _prepare(options)
    module = StableDiffusion(model, half=tuning.half)
    stable_diffusion.learn_lora(
        module,
        tuning,
        rank=options.rank,
        alpha=options.rank if options.alpha is None else options.alpha,
        everywhere=options.layers == "all",
    )
    trained = _train(options, model, tuning, data, module)
    if devices.is_first():
        metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(options.rank)}
        write_lora(trained.parts(), options.out, naming=options.naming, metadata=metadata)
        print(options.out)


def run_fine_tune(options: argparse.Namespace) -> None:
    """Train a whole model and write it in diffusers' layout; raises RequestError likewise."""
    model, tuning, data = _prepare(options)
    module = StableDiffusion(model)
    stable_diffusion.learn_all(module, tuning)
    trained = _train(options, model, tuning, data, module)
    if devices.is_first():
        write_tuned(options.out, model, trained, text_encoder=tuning.text_encoder)
        print(options.out)


def _prepare(options: argparse.Namespace) -> tuple[Model, TuningSettings, encoded.Encoded]:
    """Open the model, and encode the pictures unless an earlier run did."""
    path = find_model(options.model)
    model = Model.open(path, prediction_type=options.prediction_type)
    stable_diffusion.check_model(model)
    size = model.sample_size * model.vae.compression if options.size is None else options.size
    multiple = model.vae.compression * model.unet.latent_multiple
    if size < multiple or size % multiple:
        raise RequestError(f"--size is {size}; this model takes multiples of {multiple} pixels")
    tuning = TuningSettings(
        size=size,
        text_encoder=options.text_encoder,
        min_snr_gamma=options.min_snr_gamma,
        drop_captions=options.drop_captions,
        recompute=not options.no_recompute,
        half=options.precision == "bfloat16",
    )
    folder = options.work / ENCODED
    with devices.first_alone() as first:
        if first:
            _encode(options, model, size, folder)
    return model, tuning, encoded.Encoded.load(folder)


def _encode(options: argparse.Namespace, model: Model, size: int, folder: Path) -> None:
    from tqdm import tqdm

    sources = options.shards or [options.images]
    made_of = encoded.fingerprint(model, size, sources, options.prompt)
    if encoded.is_made_of(folder, made_of):
        return
    if options.shards:
        records = read_shards(options.shards)
    else:
        records = read_folder(options.images, options.prompt)
    autoencoder = stable_diffusion.load_autoencoder(model).to(options.device)
    shown = tqdm(records, desc="pictures", mininterval=5)
    encoded.encode(shown, autoencoder, size, folder, made_of)


def _train(
    options: argparse.Namespace,
    model: Model,
    tuning: TuningSettings,
    data: encoded.Encoded,
    module: StableDiffusion,
) -> StableDiffusion:
    settings = dataclasses.replace(
        loop_settings(options),
        ema_decay=options.ema,
        save_seconds=60 * options.save_minutes,
        warmup_steps=min(100, max(options.steps // 10, 1)),
        records=False,
    )
    tokenizers = load_tokenizers(model)
    trained, loop = stable_diffusion.train(
        data, module, tokenizers, model, tuning, settings, options.work
    )
    if devices.is_first():
        _report(options, loop, module)
    return trained


def _report(options: argparse.Namespace, loop: Loop, module: nn.Module) -> None:
    """Print and record what the training took."""
    learn = sum(value.numel() for value in module.parameters() if value.requires_grad)
    seconds = loop.seconds / max(loop.step, 1)
    peak = peak_memory(loop.settings.device)
    facts = {
        "steps": loop.step,
        "seconds_a_step": round(seconds, 3),
        "peak_memory_bytes": peak,
        "parameters": learn,
    }
    write_json(options.work / "tuning.json", facts)
    print(
        f"{loop.step} steps, {seconds:.2f} s each; {learn:,} parameters; "
        f"{peak / 2**30:.2f} GiB at the most"
    )


def peak_memory(device: str) -> int:
    """Return the most bytes that were in use: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
