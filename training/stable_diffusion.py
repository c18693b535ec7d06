"""Training of a Stable Diffusion from its checkpoint: all of it, or a LoRA.

The loss is that of Ho et al. 2020, arXiv:2006.11239, equation 14, in what the model predicts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.checkpoints.component import ComponentName
from engine.configs.diffusion import AutoencoderConfig
from engine.errors import RequestError
from engine.graphs.graph import TextPart
from engine.model import Model
from export.modules.autoencoder import Autoencoder
from export.modules.clip import TextEncoder
from export.modules.layers import ResnetBlock
from export.modules.unet import UNet
from export.modules.unet_blocks import SpatialTransformer
from runtime.conditioning.tokenizer import Tokenizer
from runtime.samplers.noise_schedule import NoiseSchedule
from training.devices import share
from training.encoded import Encoded
from training.loop import Loop, LoopSettings, Losses
from training.lora import add_lora

LEARN = ("attentions", "resnets", "downsamplers", "upsamplers")  # of the UNet, with layers "all"
TEXT_LEARN = ("self_attn", "mlp")
TIME_IDS = 6  # of XL: sizes before and after cutting
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """Choices of a training that begins with a checkpoint.

    size: of pictures in pixels; text_encoder: whether the text encoders learn too
    min_snr_gamma: Hang et al. 2023, arXiv:2303.09556, equation 8; None weighs all timesteps alike
    drop_captions: share of captions replaced by the empty text
    recompute: keep few activations, and compute the others again in the backward pass
    half: whether layers compute in bfloat16
    """

    size: int
    text_encoder: bool = False
    min_snr_gamma: float | None = None
    drop_captions: float = 0.1
    recompute: bool = True
    half: bool = True

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        if not 0 <= self.drop_captions <= 1:
            raise RequestError(f"drop_captions is {self.drop_captions}; it is a share, 0 to 1")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise RequestError(f"min_snr_gamma is {self.min_snr_gamma}; give a number above 0")


class StableDiffusion(nn.Module):
    """The text encoders and the UNet of a checkpoint; half: frozen matrices in bfloat16."""

    def __init__(self, model: Model, *, half: bool = False) -> None:
        super().__init__()
        self.before_last = model.family.context == "penultimate_hidden_state"
        self.zeros_for_empty = model.zeros_for_empty_prompt
        self.texts: list[TextPart] = list(model.text_encoders)
        for name, config in model.text_encoders.items():
            encoder = loaded(partial(TextEncoder, config), model, name, half=half)
            self.add_module(name, encoder)
        self.unet = loaded(partial(UNet, model.unet), model, "unet", half=half)
        self.takes_sizes = "time_ids" in model.unet.extra_inputs

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts by what they are to diffusers."""
        return {name: self.get_submodule(name) for name in (*self.texts, "unet")}

    def condition(
        self, input_ids: Mapping[TextPart, Tensor], empty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the context (B, n, D) and the last encoder's pooled text (B, P).

        input_ids: (B, n) int64 of each text encoder; empty: (B,) bool, rows of the empty text
        """
        states, pooled = [], torch.empty(0)
        for name in self.texts:
            last, penultimate, pooled = self.get_submodule(name)(input_ids[name])
            states.append(penultimate if self.before_last else last)
        context = torch.cat(states, dim=-1)
        if self.zeros_for_empty:
            context = context.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return context, pooled

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        input_ids: Mapping[TextPart, Tensor],
        empty: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """Predict (B, C, h, w) of noisy latents; time_ids: (B, 6), which XL alone is told."""
        context, pooled = self.condition(input_ids, empty)
        added = {"text_embeds": pooled, "time_ids": time_ids} if self.takes_sizes else {}
        return self.unet(latents, timesteps, context, **added)


def loaded(make: Callable[[], M], model: Model, name: ComponentName, *, half: bool = False) -> M:
    """Build a component's module with its weights, float32; half: its matrices in bfloat16."""
    with torch.device("meta"):
        module = make()
    component = model.component(name)

    def tensor(array: np.ndarray) -> Tensor:
        value = torch.from_numpy(array.astype(np.float32))
        return value.to(torch.bfloat16) if half and value.ndim > 1 else value

    module.load_state_dict({n: tensor(a) for n, a in component.items()}, assign=True)
    component.release()
    return module.requires_grad_(False)


def load_autoencoder(model: Model) -> Autoencoder:
    """Build the autoencoder, float32; raises RequestError for a tiny one."""
    config = model.vae
    if not isinstance(config, AutoencoderConfig):
        raise RequestError(f"{model.path} has a tiny autoencoder; train with the whole one")
    return loaded(partial(Autoencoder, config), model, "vae").eval()


def check_model(model: Model) -> None:
    """Raise RequestError for a model whose training needs more than pictures and captions."""
    unet = model.unet
    why = None
    if model.is_inpainting:
        why = "was trained to fill masks"
    elif unet.time_cond_proj_dim or model.variant is not None:
        why = "was distilled to few steps, which such a training would undo"
    elif "time_ids" in unet.extra_inputs and unet.addition_time_ids != TIME_IDS:
        why = "is a refiner"
    if why is not None:
        raise RequestError(f"{model.path} {why}; train the model that it was made from")


def learn_lora(
    module: StableDiffusion, settings: TuningSettings, *, rank: int, alpha: float, everywhere: bool
) -> None:
    """Give the UNet's layers factors, and the text encoders' with settings.text_encoder.

    everywhere: also in convolutions. Layers behind what is attended to learn nothing.
    """
    places = LEARN if everywhere else LEARN[:1]
    add_lora(module.unet, rank, alpha=alpha, chosen=_within(places))
    if settings.text_encoder:
        for name in module.texts:
            chosen = _within(TEXT_LEARN, without=_unused(module, name))
            add_lora(module.get_submodule(name), rank, alpha=alpha, chosen=chosen)


def learn_all(module: StableDiffusion, settings: TuningSettings) -> None:
    """Let the UNet learn, and with settings.text_encoder the text encoders."""
    module.unet.requires_grad_(True)
    if settings.text_encoder:
        for name in module.texts:
            unused = _unused(module, name)
            for key, parameter in module.get_submodule(name).named_parameters():
                parameter.requires_grad_(not key.startswith(unused))


def _within(places: tuple[str, ...], without: tuple[str, ...] = ()) -> Callable[[str], bool]:
    def chosen(name: str) -> bool:
        return any(p in name.split(".") for p in places) and not name.startswith(without)

    return chosen


def _unused(module: StableDiffusion, name: TextPart) -> tuple[str, ...]:
    """Return where an encoder's tensors are that the UNet sees nothing of."""
    if not module.before_last or (module.takes_sizes and name == module.texts[-1]):
        return ()
    encoder = module.get_submodule(name)
    assert isinstance(encoder, TextEncoder)
    last = encoder.config.num_hidden_layers - 1
    return (
        f"text_model.encoder.layers.{last}.",
        "text_model.final_layer_norm.",
        "text_projection.",
    )


def recompute(module: nn.Module) -> None:
    """Let the UNet's blocks keep their inputs alone (Chen et al. 2016, arXiv:1604.06174)."""
    for block in module.modules():
        if isinstance(block, ResnetBlock | SpatialTransformer):
            again = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = again  # type: ignore[method-assign]


def train(
    encoded: Encoded,
    module: StableDiffusion,
    tokenizers: Mapping[TextPart, Tokenizer],
    model: Model,
    tuning: TuningSettings,
    settings: LoopSettings,
    folder: Path,
) -> tuple[StableDiffusion, Loop]:
    """Train what learns in a module; return its average, or itself, and the loop.

    Raises RequestError when the checkpoint in `folder` is of another training.
    """
    if tuning.recompute:
        recompute(module.unet)
    loop = Loop(module, settings, folder / "tuning.pt")
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no noise twice
    device, batch, config = torch.device(settings.device), settings.batch_size, model.vae
    assert isinstance(config, AutoencoderConfig)
    schedule = NoiseSchedule.from_config(model.scheduler)
    alphas = torch.tensor(schedule.alphas_cumprod).float().to(device)
    kind = device.type

    def losses(step: int) -> Losses:
        chosen = share(torch.randint(len(encoded), (batch,)))
        texts, empty = share_texts(encoded, chosen, rng, batch, tuning.drop_captions)
        ids = {
            name: torch.from_numpy(tokenizer(texts).input_ids).to(device)
            for name, tokenizer in tokenizers.items()
        }
        mean, deviation = encoded.moments[chosen].to(device).float().chunk(2, dim=1)
        drawn = share(torch.randn(2, batch, *mean.shape[1:], device=device).swapaxes(0, 1))
        x0 = (mean + deviation * drawn[:, 0] - config.shift_factor) * config.scaling_factor
        noise = drawn[:, 1]
        timesteps = share(torch.randint(len(alphas), (batch,), device=device))
        signal = alphas[timesteps][:, None, None, None]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        sizes = torch.full((len(chosen), TIME_IDS), float(tuning.size))
        sizes[:, :4] = encoded.sizes[chosen]
        with torch.autocast(kind, torch.bfloat16, enabled=tuning.half):
            out = module(
                alpha * x0 + sigma * noise,
                timesteps,
                ids,
                torch.from_numpy(empty).to(device),
                sizes.to(device),
            )
        wanted = target(schedule.prediction_type, x0, noise, alpha, sigma)
        errors = (out.float() - wanted).square().mean((1, 2, 3))
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        return {"loss": (weights(schedule.prediction_type, snr, tuning) * errors).mean()}

    trained = loop.run(losses, name="tuning")
    assert isinstance(trained, StableDiffusion)
    return trained, loop


def share_texts(
    encoded: Encoded, chosen: Tensor, rng: np.random.Generator, batch: int, dropped: float
) -> tuple[list[str], np.ndarray]:
    """Draw a caption of each picture, some of them empty: the texts, and (B,) bool which are."""
    which = share(torch.from_numpy(rng.random((batch, 2)))).numpy()
    empty = which[:, 0] < dropped
    texts = []
    for index, (_, at), nothing in zip(chosen.tolist(), which, empty, strict=True):
        captions = encoded.captions[index]
        texts.append("" if nothing else captions[int(at * len(captions))])
    return texts, empty


def target(kind: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what the model is to predict, of the shape of x0 (B, C, h, w).

    alpha, sigma: (B, 1, 1, 1), the shares of signal and noise
    """
    if kind == "epsilon":
        return noise
    return x0 if kind == "sample" else alpha * noise - sigma * x0


def weights(kind: str, snr: Tensor, tuning: TuningSettings) -> Tensor:
    """Return how much the errors at these signal-to-noise ratios (B,) count, (B,)."""
    gamma = tuning.min_snr_gamma
    if gamma is None:
        return torch.ones_like(snr)
    if kind == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, also where snr is 0
    least = snr.clamp(max=gamma)
    return least if kind == "sample" else least / (snr + 1)
