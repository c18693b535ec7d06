"""How far a denoiser is from v, at chosen noise levels and with the same noise every time."""

import torch
from torch import Tensor

from runtime.samplers.noise_schedule import NoiseSchedule
from training.diffusion import SCHEDULER, Denoiser
from training.loop import attention, autocast

BATCH = 64
DRAWS = 2  # noise levels at which the validation loss sees each picture


@torch.no_grad()
def squared_errors(
    denoiser: Denoiser, latents: Tensor, input_ids: Tensor, timesteps: Tensor, *, seed: int = 0
) -> Tensor:
    """Return the mean squared error in v of each row, (n,) float32, on the processor.

    latents: (n, C, h, w); input_ids: (n, MAX_TOKENS) int64; timesteps: (n,) int64
    """
    alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod).float()
    noises = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    device, errors = next(denoiser.parameters()).device, []
    for rows in torch.arange(len(latents)).split(BATCH):
        x0, noise, at = latents[rows].float(), noises[rows], timesteps[rows]
        alpha = alphas[at].sqrt()[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        x = (alpha * x0 + sigma * noise).to(device)
        with autocast(device.type), attention(device.type):
            out = denoiser(x, at.to(device), input_ids[rows].to(device)).float().cpu()
        errors.append((out - (alpha * noise - sigma * x0)).square().mean((1, 2, 3)))
    return torch.cat(errors)


def mean_loss(denoiser: Denoiser, latents: Tensor, input_ids: Tensor) -> float:
    """Return the mean squared error in v over noise levels that lie evenly in the schedule.

    latents: (n, C, h, w), each seen at DRAWS of the levels, n DRAWS in all
    input_ids: (n, MAX_TOKENS) int64
    """
    count, total = len(latents), len(latents) * DRAWS
    levels = NoiseSchedule.from_config(SCHEDULER).num_train_timesteps
    timesteps = ((torch.arange(total, dtype=torch.float64) + 0.5) / total * levels).long()
    rows = torch.arange(total) % count
    return float(squared_errors(denoiser, latents[rows], input_ids[rows], timesteps).mean())
