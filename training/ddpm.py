"""A small diffusion model in pixels: classes of a data set, without an autoencoder.

Ho et al. 2020, arXiv:2006.11239, with the noise schedules and losses that are compared in
`python -m training ddpm --help`. A class is asked for by its name, so text encoder, guidance and
runtime are those of every other model here; the latents are the pixels themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.configs.diffusion import IdentityAutoencoderConfig, UNetConfig
from export.modules.identity_autoencoder import IdentityAutoencoder
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers.noise_schedule import NoiseSchedule
from training.devices import share
from training.diffusion import UNCONDITIONAL, Denoiser, initialise
from training.idx import LabelledPictures
from training.loop import Loop, LoopSettings, Losses, attention, autocast
from training.ship import write_model
from training.text_encoders import MAX_TOKENS
from training.vocabulary import cut_vocabulary, write_tokenizer

CHECKPOINT = "ddpm.pt"
TIMESTEPS = 300
# The names of diffusers' `beta_schedule` by those of the literature.
SCHEDULES: Mapping[str, str] = {
    "linear": "linear",  # Ho et al. 2020
    "cosine": "squaredcos_cap_v2",  # Nichol & Dhariwal 2021, arXiv:2102.09672
    "quadratic": "scaled_linear",
    "sigmoid": "sigmoid",
}
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
PREDICTIONS = ("v_prediction", "epsilon")
GRAY = IdentityAutoencoderConfig(latent_channels=1)
UNET = UNetConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=64,
    attention_head_dim=(1, 2, 2),
    norm_num_groups=8,
    addition_embed_type="text",
    addition_embed_type_num_heads=2,
)


def scheduler(schedule: str, prediction: str, timesteps: int = TIMESTEPS) -> dict[str, object]:
    """Return the `scheduler_config.json` of a noise schedule, by its name in SCHEDULES."""
    return {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": SCHEDULES[schedule],
        "beta_start": 0.0001,
        "clip_sample": False,
        "num_train_timesteps": timesteps,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
    }


def class_tokenizer(folder: Path, classes: Sequence[str]) -> Tokenizer:
    """Write a tokenizer that spells names, letter by letter, and open it."""
    vocabulary, merges = cut_vocabulary(classes, 514, [])
    write_tokenizer(folder, vocabulary, merges, MAX_TOKENS)
    return Tokenizer.load(folder)


def train(
    pictures: LabelledPictures,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    settings: LoopSettings,
    folder: Path,
    *,
    config: Mapping[str, object],
    loss: str,
    unet: UNetConfig = UNET,
) -> Denoiser:
    """Train on labelled pictures; the checkpoint goes to `folder`.

    config: of `scheduler`; loss: of LOSSES
    """
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(tokenizer.vocab_size, unet)
    initialise(denoiser)
    loop = Loop(denoiser, settings, folder / CHECKPOINT)
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no noise twice
    device, batch = torch.device(settings.device), settings.batch_size
    schedule = NoiseSchedule.from_config(config)
    alphas = torch.tensor(schedule.alphas_cumprod).float().to(device)
    images = as_latents(pictures.images).to(device)
    labels = torch.from_numpy(pictures.labels).to(device)
    ids = torch.from_numpy(tokenizer([*classes, ""]).input_ids).to(device)

    def losses(step: int) -> Losses:
        chosen = torch.randint(len(images), (batch,), device=device)
        dropped = torch.rand(batch, device=device) < UNCONDITIONAL
        asked = share(torch.where(dropped, len(classes), labels[chosen]))
        timesteps = share(torch.randint(len(alphas), (batch,), device=device))
        noise = share(torch.randn(batch, *images.shape[1:], device=device))
        x0 = images[share(chosen)]
        alpha = alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        x = alpha * x0 + sigma * noise
        with autocast(settings.device), attention(settings.device):
            contexts, _, _ = denoiser.text_encoder(ids)  # of all classes: fewer than a batch has
            out = denoiser.unet(x, timesteps, contexts[asked])
        eps = schedule.prediction_type == "epsilon"
        wanted = noise if eps else alpha * noise - sigma * x0
        return {"loss": LOSSES[loss](out.float(), wanted)}

    ema = loop.run(losses, name="ddpm")
    assert isinstance(ema, Denoiser)
    return ema


def write(
    out: Path, denoiser: Denoiser, tokenizer: Path, config: Mapping[str, object], side: int
) -> None:
    """Write the model as a folder; its autoencoder is the identity. side: of its pictures."""
    none = IdentityAutoencoder(GRAY)
    write_model(out, denoiser, none, tokenizer, scheduler=config, sample_size=side)


def as_latents(images: np.ndarray) -> Tensor:
    """Return pictures (n, side, side) uint8 as (n, 1, side, side) float32 from -1 to 1."""
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1
