"""Training of the text encoder and the UNet together, in the autoencoder's latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.configs.diffusion import TextEncoderConfig, UNetConfig
from export.modules.autoencoder import Autoencoder
from export.modules.layers import ResnetBlock
from export.modules.unet import UNet
from export.modules.unet_blocks import SpatialTransformer
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from training.devices import share
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, attention, autocast, draw
from training.text_encoders import initialise_text, make_config, make_module

UNET = UNetConfig(
    block_out_channels=(96, 144, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=192,
    in_channels=8,
    out_channels=8,
    # Heads of 32, 48 and 32, and groups of an even size, as the fused kernels of GPUs want them.
    attention_head_dim=(3, 3, 4),
    norm_num_groups=8,
    # The pooled text reaches every residual block; attention alone learns far more slowly.
    addition_embed_type="text",
    addition_embed_type_num_heads=6,
)
TERMINAL_SNR = 1 / 80**2


def terminal_noise_betas() -> list[float]:
    """Return 1000 betas, scaled linear ones that are changed to end in all but noise alone.

    Stable Diffusion's own end at a signal of 0.07, which tints backgrounds: Lin et al. 2023,
    "Common diffusion noise schedules and sample steps are flawed", arXiv:2305.08891, algorithm 1.
    TERMINAL_SNR is added at every timestep: half of diffusers' schedulers know no signal of zero,
    and methods in sigma take steps that are too long from where it is infinite.
    """
    signal = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    rescaled = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
    snr = rescaled / (1 - rescaled) + TERMINAL_SNR
    alphas_cumprod = snr / (1 + snr)
    betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    return [float(f"{beta:.7g}") for beta in betas]


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": terminal_noise_betas(),
}
UNCONDITIONAL = 0.1  # share of captions replaced by nothing (Ho & Salimans 2022, arXiv:2207.12598)
UNIFORM_TIMESTEPS = 0.3  # the others favour noise, where the text decides what is drawn
# Beside what the options of the command say.
OPTIMISATION: Mapping[str, Any] = {"muon": True, "weight_decay": 0.2}
PREVIEW_STEPS = (1, 5, 10, 15, 20)
GUIDANCE_SCALE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What the training draws from.

    latents: (n, C, h, w) float32, or float16 of a mapped file, normalised
    captions: (index, rng) -> the texts of that picture, of which each step draws one
    draws: (n,), how often each is drawn beside the others; None draws all alike
    """

    latents: Tensor
    captions: Callable[[int, np.random.Generator], Sequence[str]]
    draws: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The tokens of all captions; of picture i they are the `counts[i]` rows from `starts[i]` on.

    input_ids: (captions, MAX_TOKENS) int32; starts, counts: (n,) int64
    """

    input_ids: Tensor
    starts: Tensor
    counts: Tensor

    @classmethod
    def of(cls, examples: Examples, tokenizer: Tokenizer, rng: np.random.Generator) -> "Texts":
        """Tokenise every picture's captions."""
        rows, counts = [], []
        for index in range(len(examples.latents)):
            texts = examples.captions(index, rng)
            rows.append(tokenizer(texts).input_ids.astype(np.int32))
            counts.append(len(texts))
        ends = torch.tensor(counts).cumsum(0)
        starts = ends - torch.tensor(counts)
        ids = torch.from_numpy(np.concatenate(rows))
        return cls(input_ids=ids, starts=starts, counts=ends - starts)

    def to(self, device: torch.device) -> "Texts":
        """Return the same on a device."""
        return Texts(
            input_ids=self.input_ids.to(device),
            starts=self.starts.to(device),
            counts=self.counts.to(device),
        )

    def drawn(self, chosen: Tensor) -> Tensor:
        """Draw a caption of each of the pictures (B,): (B, MAX_TOKENS) int64."""
        counts = self.counts[chosen]
        at = (torch.rand(len(chosen), device=chosen.device) * counts).long().minimum(counts - 1)
        return self.input_ids[self.starts[chosen] + at].long()


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that one optimiser and one EMA hold both.

    text: of another encoder than CLIP's, whose states the UNet attends to
    """

    def __init__(
        self, vocab_size: int, unet: UNetConfig = UNET, text: TextEncoderConfig | None = None
    ) -> None:
        super().__init__()
        if text is None:
            text = make_config("clip", vocab_size, unet.cross_attention_dim)
        self.text = text
        self.text_encoder = make_module(text)
        self.unet = UNet(replace(unet, cross_attention_dim=text.hidden_size))

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Predict v: (B, C, h, w), (B,), (B, MAX_TOKENS) int64 -> (B, C, h, w)."""
        context, _, _ = self.text_encoder(input_ids)
        return self.unet(latents, timesteps, context)


def initialise(denoiser: Denoiser) -> None:
    """Start every residual branch and the output at nothing (Ho et al. 2020, appendix B)."""
    last: list[nn.Module] = [denoiser.unet.conv_out]
    for module in denoiser.unet.modules():
        if isinstance(module, ResnetBlock):
            last.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    initialise_text(denoiser.text_encoder)


def train(
    examples: Examples,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder,
    settings: LoopSettings,
    folder: Path,
    *,
    prompts: list[str],
    unet: UNetConfig = UNET,
    start: Mapping[str, Tensor] | None = None,
    text: TextEncoderConfig | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Denoiser:
    """Train on the examples; checkpoints and sample grids of `prompts` go to `folder`.

    `start` is the state of a denoiser to train on from, tensors by their names and of their shapes;
    without it, training begins anew. text: of another encoder than CLIP's; frozen: its weights,
    (of their shapes), which then do not learn.
    """
    autoencoder = autoencoder.to(settings.device)
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(tokenizer.vocab_size, unet, text)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    if start is None:
        initialise(denoiser)
    else:
        denoiser.load_state_dict(start)
    if frozen is not None:
        denoiser.text_encoder.load_state_dict(frozen)
        denoiser.text_encoder.requires_grad_(False)
    loop = Loop(denoiser, settings, folder / "diffusion.pt")
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no noise twice
    device, batch = torch.device(settings.device), settings.batch_size
    alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod).float().to(device)
    latents, weights = examples.latents.to(device), None
    if examples.draws is not None:
        weights = torch.from_numpy(examples.draws).to(device)
    texts = Texts.of(examples, tokenizer, rng).to(device)
    empty = torch.from_numpy(tokenizer([""]).input_ids).to(device)

    def losses(step: int) -> Losses:
        chosen = draw(len(latents), batch, weights, device)
        input_ids = share(texts.drawn(chosen))
        dropped = share(torch.rand(batch, 1, device=device) < UNCONDITIONAL)
        timesteps = share(draw_timesteps(batch, len(alphas), device))
        noise = share(torch.randn(batch, *latents.shape[1:], device=device))
        x0 = latents[share(chosen)].float()
        alpha = alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        x = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        with autocast(settings.device), attention(settings.device):
            out = denoiser(x, timesteps, torch.where(dropped, empty, input_ids))
        # v of Salimans & Ho 2022, arXiv:2202.00512, section 4
        return {"loss": (out.float() - (alpha * noise - sigma * x0)).square().mean()}

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, Denoiser)
        input_ids = torch.from_numpy(tokenizer(["", *prompts]).input_ids).to(settings.device)
        rows = denoise(ema, autoencoder, input_ids, size=tuple(examples.latents.shape[1:]))
        save_grid(rows, folder / f"diffusion-{step:06d}.png")

    ema = loop.run(losses, sample=sample, name="diffusion")
    assert isinstance(ema, Denoiser)
    return ema


def draw_timesteps(
    count: int, num_train_timesteps: int, device: torch.device | None = None
) -> Tensor:
    """Draw timesteps (count,) int64: some uniform, the others the denser the noisier."""
    uniform, noisy, kind = torch.rand(3, count, device=device)
    chosen = torch.where(kind < UNIFORM_TIMESTEPS, uniform, noisy.sqrt())
    return (chosen * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


@torch.no_grad()
def denoise(
    denoiser: Denoiser, autoencoder: Autoencoder, input_ids: Tensor, *, size: tuple[int, ...]
) -> list[np.ndarray]:
    """Draw each prompt in 20 guided DDIM steps; return rows of pictures at PREVIEW_STEPS.

    input_ids: (1 + n, MAX_TOKENS), the first for the unconditional text; size: (C, h, w) of the
    latents. Each row is (n, H, W, 3) uint8.
    """
    device = input_ids.device
    count = len(input_ids) - 1
    steps = program("ddim", NoiseSchedule.from_config(SCHEDULER), PREVIEW_STEPS[-1])
    noise = torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(device)
    x = steps.initial_noise * noise
    context, _, _ = denoiser.text_encoder(input_ids)
    context = torch.cat([context[:1].expand(count, -1, -1), context[1:]])
    rows = []
    for i, matrix in enumerate(steps.matrices, 1):
        timestep = torch.full((2 * count,), float(steps.timesteps[i - 1]), device=device)
        scaled = torch.cat([x * float(steps.input_scales[i - 1])] * 2)
        uncond, cond = denoiser.unet(scaled, timestep, context).chunk(2)
        out = uncond + GUIDANCE_SCALE * (cond - uncond)
        x = float(matrix[0, 0]) * x + float(matrix[0, 1]) * out
        if i in PREVIEW_STEPS:
            pixels = autoencoder.decode(x / autoencoder.config.scaling_factor)
            pixels = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte()
            rows.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return rows
