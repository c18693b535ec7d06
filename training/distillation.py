"""Distillation into few calls: what a model draws in 20 guided calls, in 4 without guidance.

The teacher draws along DDIM. The student learns to go from one of its states in one call to where
five guided calls of the teacher lead: progressive distillation (Salimans & Ho 2022,
arXiv:2202.00512) in one stage, with the guidance in it (Meng et al. 2023, arXiv:2210.03142). What
it learns is a LoRA of the UNet.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import RequestError
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import Program
from training.dataset import TrainingSet
from training.diffusion import GUIDANCE_SCALE, SCHEDULER, Denoiser
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, attention, autocast, draw
from training.lora import add_lora, write_lora

TEACHER_STEPS = 20
STEPS = 4
RANK = 14  # 2 MB
BATCH = 64  # of the teacher's runs that are computed together, and the least that is kept of them
SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Runs of the teacher.

    states: (n, STEPS + 1, C, h, w) float16, x before each of the student's calls and at the end
    input_ids: (n, MAX_TOKENS) int64, the prompts
    """

    states: Tensor
    input_ids: Tensor


def trajectories(
    data: TrainingSet,
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    count: int,
    size: tuple[int, ...],
    device: str,
    seed: int = 0,
) -> Trajectories:
    """Let the teacher draw captions of the data set; what is in `folder` is not drawn again.

    size: (C, h, w) of the latents. Raises RequestError when the folder holds another model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = None if data.draws is None else torch.from_numpy(data.draws)
    pieces = []
    for start in range(0, count, BATCH):
        path = folder / f"{seed}-{start:06d}.pt"
        if not path.exists():
            rng = np.random.default_rng([seed, start])
            torch.manual_seed(int(rng.integers(2**62)))
            chosen = draw(len(data.images), BATCH, weights, torch.device("cpu"))
            texts = [data.caption(int(index), rng) for index in chosen]
            ids = torch.from_numpy(tokenizer(["", *texts]).input_ids)
            states = teach(denoiser, ids.to(device), torch.randn(BATCH, *size).to(device))
            piece = {"states": states.to("cpu", torch.float16), "input_ids": ids[1:]}
            torch.save(piece, partial := path.with_suffix(".partial"))
            partial.replace(path)
        pieces.append(torch.load(path, weights_only=True))
        if tuple(pieces[-1]["states"].shape[2:]) != size:
            raise RequestError(f"{path} is of another model; give another working folder")
    return Trajectories(
        states=torch.cat([piece["states"] for piece in pieces]),
        input_ids=torch.cat([piece["input_ids"] for piece in pieces]),
    )


@torch.no_grad()
def teach(denoiser: Denoiser, input_ids: Tensor, noise: Tensor) -> Tensor:
    """Draw with guidance; return x before each of the student's calls, (n, STEPS + 1, C, h, w).

    input_ids: (1 + n, MAX_TOKENS), the first for the unconditional text; noise: (n, C, h, w)
    """
    device, count = noise.device, len(noise)
    steps = _program(TEACHER_STEPS)
    context, _, _ = denoiser.text_encoder(input_ids)
    context = torch.cat([context[:1].expand(count, -1, -1), context[1:]])
    x, kept = steps.initial_noise * noise, []
    for i, matrix in enumerate(steps.matrices):
        if i % (TEACHER_STEPS // STEPS) == 0:
            kept.append(x)
        timestep = torch.full((2 * count,), float(steps.timesteps[i]), device=device)
        with autocast(device.type), attention(device.type):
            out = denoiser.unet(torch.cat([x, x]), timestep, context).float()
        uncond, cond = out.chunk(2)
        x = float(matrix[0, 0]) * x + float(matrix[0, 1]) * (
            uncond + GUIDANCE_SCALE * (cond - uncond)
        )
    return torch.stack([*kept, x], dim=1)


def train(
    taught: Trajectories,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    settings: LoopSettings,
    folder: Path,
    *,
    rank: int = RANK,
) -> Denoiser:
    """Train a LoRA of the denoiser's UNet; checkpoints and sample grids go to `folder`."""
    torch.manual_seed(settings.seed)
    denoiser.text_encoder.requires_grad_(False)
    add_lora(denoiser.unet, rank)
    loop = Loop(denoiser, settings, folder / "distillation.pt")
    torch.manual_seed(settings.seed + loop.step)
    device, batch, steps = torch.device(settings.device), settings.batch_size, _program(STEPS)
    timesteps = torch.from_numpy(steps.timesteps).float().to(device)
    weights = torch.from_numpy(steps.matrices[:, 0, :2]).float().to(device)
    states, input_ids = taught.states.to(device), taught.input_ids.to(device)

    def losses(step: int) -> Losses:
        chosen = torch.randint(len(states), (batch,), device=device)
        call = torch.randint(STEPS, (batch,), device=device)
        x, wanted = states[chosen, call].float(), states[chosen, call + 1].float()
        with autocast(settings.device), attention(settings.device):
            out = denoiser(x, timesteps[call], input_ids[chosen]).float()
        of_x, of_out = weights[call].T[..., None, None, None]
        return {"loss": (of_x * x + of_out * out - wanted).square().mean()}

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, Denoiser)
        drawn = run(ema, input_ids[:SHOWN], states[:SHOWN, 0].float())
        scale = autoencoder.config.scaling_factor
        rows = [
            (autoencoder.decode(x.cpu() / scale).clamp(-1, 1).add(1).mul(127.5).round().byte())
            .permute(0, 2, 3, 1)
            .numpy()
            for x in (states[:SHOWN, -1].float(), drawn)
        ]
        save_grid(rows, folder / f"distillation-{step:06d}.png")

    ema = loop.run(losses, sample=torch.no_grad()(sample), name="distillation")
    assert isinstance(ema, Denoiser)
    return ema


def write(denoiser: Denoiser, path: Path) -> None:
    """Write the LoRA that `train` made."""
    write_lora({"unet": denoiser.unet}, path)


@torch.no_grad()
def run(denoiser: Denoiser, input_ids: Tensor, noise: Tensor) -> Tensor:
    """Draw in STEPS calls without guidance: (n, MAX_TOKENS), (n, C, h, w) -> (n, C, h, w)."""
    steps, x = _program(STEPS), noise
    for timestep, matrix in zip(steps.timesteps, steps.matrices, strict=True):
        out = denoiser(x, torch.full((len(x),), float(timestep), device=x.device), input_ids)
        x = float(matrix[0, 0]) * x + float(matrix[0, 1]) * out
    return x


def _program(steps: int) -> Program:
    """Return DDIM's run, whose input scales are 1."""
    return program("ddim", NoiseSchedule.from_config(SCHEDULER), steps)
