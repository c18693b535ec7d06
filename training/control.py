"""A control for a model: a control-LoRA of its UNet that follows the edges of a picture.

A ControlNet (Zhang et al. 2023, arXiv:2302.05543) begins as a copy of the UNet's way down. Here the
copy's matrices stay the UNet's own and learn differences of low rank, as in Stability's
control-LoRAs, so the file is a small part of the model's; the hint's encoder, the convolutions of
one pixel, biases and norms are whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.backends.settings import BackendSettings
from engine.checkpoints.control_lora import MARK
from engine.checkpoints.control_net import open_control_net
from engine.configs.control_net import control_net_of
from engine.graphs.graph import graph_name
from engine.model import Model, find_model
from engine.shipped import find_control
from engine.store.cache import cache_folder
from export.modules.autoencoder import Autoencoder
from export.modules.control_net import ControlNet, by_level
from export.writing import export_control_net, export_part
from runtime import Control, Pipeline, Request
from runtime.conditioning.tokenizer import Tokenizer
from runtime.preprocessors.named import Canny
from runtime.samplers.noise_schedule import NoiseSchedule
from training.autoencoder import encode
from training.dataset import TrainingSet
from training.diffusion import (
    GUIDANCE_SCALE,
    SCHEDULER,
    Denoiser,
    Examples,
    Texts,
    denoise,
    draw_timesteps,
)
from training.grids import save_grid
from training.loop import Loop, LoopSettings, Losses, attention, autocast, draw
from training.lora import add_lora, factors
from training.pictograms import STYLES, Pictograms, caption

RANK = 44
HINT_WIDTHS = (16, 32, 64, 96)
WITHOUT_TEXT = 0.5  # of the captions, as Zhang et al. leave out, so that the edges must tell
COPIES = 4  # of a picture: moved, bent, moved, bent
BENDS = 4  # cells across and down, whose corners move
CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))  # down and right, from the upper left, as PIL has them
SHOWN = 8
OWN = "controlnet_"  # begins the names of what a UNet has not
NET = "edges"
STEPS, BATCH = 20, 4
SEED = 11  # of the pictures that are measured


class ControlledDenoiser(nn.Module):
    """A denoiser that stays as it is, and a ControlNet that begins as a copy of its way down."""

    def __init__(self, denoiser: Denoiser, rank: int = RANK) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False)
        config = control_net_of(denoiser.unet.config)
        self.net = ControlNet(replace(config, conditioning_embedding_out_channels=HINT_WIDTHS))
        unet, own = denoiser.unet.state_dict(), self.net.state_dict()
        self.net.load_state_dict({name: unet.get(name, value) for name, value in own.items()})
        last = self.net.controlnet_cond_embedding.conv_out
        for layer in (last, *self.net.controlnet_down_blocks, self.net.controlnet_mid_block):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for name, child in self.net.named_children():
            if not name.startswith(OWN):
                add_lora(child, rank)
        for parameter in self.net.parameters():
            if parameter.ndim == 1:
                parameter.requires_grad_(True)

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, picture: Tensor
    ) -> Tensor:
        """Predict v: (B, C, h, w), (B,), (B, n, D) and the hint (B, 3, 8 h, 8 w), 0 to 1."""
        unet, net = self.denoiser.unet, self.net
        maps = net(latents, timesteps, context, net.controlnet_cond_embedding(picture))
        residuals = by_level(maps, net.config.residual_widths())
        out, _ = unet.with_deep(latents, timesteps, context, residuals=residuals)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgedPictures:
    """What the training sees of n pictures: COPIES of each, moved and bent, copy by copy.

    A model knows by heart how the pictures that it has seen lie, and would learn no edges of them.
    latents: (COPIES · n, C, h, w) float16, scaled; edges: (COPIES · n, H · W / 8) uint8, a bit a
        pixel
    """

    latents: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, autoencoder: Autoencoder, path: Path) -> Self:
        """Encode pictures (n, H, W, 3) uint8 and find their edges, or read them from `path`."""
        scale = autoencoder.config.scaling_factor
        rng, latents, found = np.random.default_rng(0), [], []
        first = (encode(autoencoder, np.stack([moved(images[0], rng)])) * scale).numpy()
        if path.exists():
            with np.load(path, allow_pickle=False) as kept:
                made = cls(latents=kept["latents"], edges=kept["edges"])
            of_these = np.allclose(made.latents[:1], first, atol=0.01)
            if of_these and len(made.latents) == len(images) * COPIES:
                return made
        rng = np.random.default_rng(0)
        for copy in range(COPIES):
            change = moved if copy % 2 == 0 else bent
            shown = np.stack([change(image, rng) for image in images])
            latents.append((encode(autoencoder, shown) * scale).numpy().astype(np.float16))
            found += [np.packbits(Canny()(image)[..., 0] > 0) for image in shown]
        made = cls(latents=np.concatenate(latents), edges=np.stack(found))
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, latents=made.latents, edges=made.edges)
        partial.replace(path)
        return made


def moved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, scale, shift and maybe mirror a picture (H, W, 3) uint8 on white."""
    height, width = image.shape[:2]
    scale, angle = rng.uniform(0.55, 1.1), np.radians(rng.uniform(-30, 30))
    centre = np.array([width, height]) / 2
    shift = rng.uniform(-0.5, 0.5, 2) * (1.15 - scale) * centre * 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    if rng.random() < 0.5:
        turn[0] *= -1
    offset = centre - turn @ (centre + shift)  # back from a place in the copy to one in the picture
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    copy = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white"
    )
    return np.asarray(copy)


def bent(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend a picture (H, W, 3) uint8 on white, where it lies: the edges that a habit would miss."""
    height, width = image.shape[:2]
    cells = np.linspace(0, 1, BENDS + 1)
    places = np.stack(np.meshgrid(cells * width, cells * height), axis=-1)  # (y, x, 2)
    stretched = (places - places.mean((0, 1))) / rng.uniform(0.85, 1.1) + places.mean((0, 1))
    from_places = stretched + rng.normal(0, 0.035, places.shape) * (width, height)
    mesh = []
    for y in range(BENDS):
        for x in range(BENDS):
            box = (*places[y, x].astype(int), *places[y + 1, x + 1].astype(int))
            corners = [from_places[y + down, x + right] for down, right in CORNERS]
            mesh.append((box, tuple(np.concatenate(corners))))
    copy = Image.fromarray(image).transform(
        (width, height), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC, fillcolor="white"
    )
    return np.asarray(copy)


def hints(packed: Tensor, side: int) -> Tensor:
    """Return edges as a net sees them: (B, side · side / 8) uint8 -> (B, 3, side, side), 0 or 1."""
    places = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> places) & 1
    return bits.reshape(-1, 1, side, side).expand(-1, 3, -1, -1).float()


def train(
    data: TrainingSet,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    tokenizer: Tokenizer,
    settings: LoopSettings,
    folder: Path,
) -> ControlledDenoiser:
    """Train on the edges of the data set's pictures; checkpoints and grids go to `folder`.

    data: its pictures are square. Every loss is v's (Salimans & Ho 2022, arXiv:2202.00512).
    """
    device, batch = torch.device(settings.device), settings.batch_size
    side = data.images.shape[1]
    pictures = EdgedPictures.of(data.images, autoencoder.to(device), folder / "edges.npz")
    packed = torch.from_numpy(pictures.edges).to(device)
    latents, count = torch.from_numpy(pictures.latents).to(device), len(data.images)
    torch.manual_seed(settings.seed)
    loop = Loop(ControlledDenoiser(denoiser), settings, folder / "control.pt")
    module = loop.module
    assert isinstance(module, ControlledDenoiser)
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no noise twice
    examples = Examples(latents=latents[:count], captions=data.captions, draws=data.draws)
    texts = Texts.of(examples, tokenizer, rng).to(device)
    empty = torch.from_numpy(tokenizer([""]).input_ids).to(device)
    weights = None if data.draws is None else torch.from_numpy(data.draws).to(device)
    alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod).float().to(device)

    def losses(step: int) -> Losses:
        chosen = draw(count, batch, weights, device)
        input_ids = texts.drawn(chosen)
        chosen = chosen + count * torch.randint(COPIES, (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < WITHOUT_TEXT
        x0, timesteps = latents[chosen].float(), draw_timesteps(batch, len(alphas), device)
        alpha = alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        noise = torch.randn_like(x0)
        with autocast(settings.device), attention(settings.device):
            context, _, _ = module.denoiser.text_encoder(torch.where(dropped, empty, input_ids))
            picture = hints(packed[chosen], side)
            out = module(alpha * x0 + sigma * noise, timesteps, context, picture)
        return {"loss": (out.float() - (alpha * noise - sigma * x0)).square().mean()}

    shown = np.linspace(0, count - 1, min(SHOWN, count)).astype(int)
    prompts = tokenizer(["", *(data.caption(int(i), rng) for i in shown)]).input_ids
    copies = shown + count * (np.arange(len(shown)) % COPIES)

    def sample(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, ControlledDenoiser)
        picture = hints(packed[torch.from_numpy(copies).to(device)], side)
        steered: Any = SimpleNamespace(
            text_encoder=ema.denoiser.text_encoder,
            unet=lambda x, timestep, context: ema(
                x, timestep, context, torch.cat([picture, picture])
            ),
        )
        ids = torch.from_numpy(prompts).to(device)
        drawn = denoise(steered, autoencoder, ids, size=tuple(latents.shape[1:]))
        lines = (255 * picture).byte().permute(0, 2, 3, 1).cpu().numpy()
        save_grid([data.images[shown], lines, drawn[-1]], folder / f"control-{step:06d}.png")

    ema = loop.run(losses, sample=sample, name="control")
    assert isinstance(ema, ControlledDenoiser)
    return ema


def write(controlled: ControlledDenoiser, path: Path) -> None:
    """Write the control-LoRA that `train` made, in float16 and diffusers' names, whole or not."""
    state = {MARK: torch.zeros(0)}
    for name, added in factors(controlled.net):
        state[f"{name}.up"] = added.up.weight * added.scale
        state[f"{name}.down"] = added.down.weight
    for name, value in controlled.net.named_parameters():
        if name.startswith(OWN) or value.ndim == 1:
            state[name] = value
    halves = {name: value.detach().to(torch.float16).contiguous() for name, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file(halves, partial, metadata={"format": "pt", "preprocessor": "canny"})
    partial.replace(path)


def evaluate(model: str, control: Path, data: Pictograms, pictures: int = 100) -> dict[str, Any]:
    """Draw held-out pictograms along their edges and without; return the F1 of edges at 1 pixel.

    The prompts, seeds and all else are the same with the control and without it. Graphs that are
    not there yet are made.
    """
    opened, control = Model.open(find_model(model)), find_control(control)
    write_graphs(opened, control, cache_folder() / "graphs")
    pairs = np.random.default_rng(SEED).permutation(np.argwhere(data.held_out))[:pictures]
    originals = data.images[pairs[:, 0], pairs[:, 1]]
    wanted = [Canny()(image)[..., 0] > 0 for image in originals]
    settings = BackendSettings(backend="cpu")
    with Pipeline.load(model, settings=settings, controls={NET: control}) as pipeline:
        scores = {
            name: [
                f1(Canny()(image)[..., 0] > 0, edge)
                for image, edge in zip(
                    _draw(pipeline, data, pairs, originals, weight), wanted, strict=True
                )
            ]
            for name, weight in (("with", 1.0), ("without", 0.0))
        }
    means = {name: float(np.mean(each)) for name, each in scores.items()}
    return {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE},
        "pictures": len(pairs),
        "f1": means["with"],
        "f1_without": means["without"],
        "gain": means["with"] - means["without"],
        "scores": scores,
    }


def write_graphs(model: Model, control: Path, folder: Path) -> None:
    """Trace a control's graphs and the step that takes residuals, where a folder lacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    config, _ = open_control_net(control, model.unet, model.weights("step"))
    names = [graph_name(part, config, "float32") for part in ("control_hint", "control")]
    if not all((folder / name).exists() for name in names):
        list(export_control_net(model, control, "float32", folder))
    if not (folder / graph_name("step_controlled", model.unet, "float32")).exists():
        export_part(model, "step_controlled", "float32", folder)


def f1(drawn: np.ndarray, wanted: np.ndarray) -> float:
    """Return the F1 of edges (H, W) bool: those within 1 pixel of the others', both ways."""
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    precision = (drawn & _near(wanted)).sum() / drawn.sum()
    recall = (wanted & _near(drawn)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(lines: np.ndarray) -> np.ndarray:
    """Return where a pixel or one of its eight neighbours is on, (H, W) bool."""
    around = np.pad(lines, 1)
    height, width = lines.shape
    shifts = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    near: np.ndarray = np.any(shifts, axis=0)
    return near


def _draw(
    pipeline: Pipeline,
    data: Pictograms,
    pairs: np.ndarray,
    originals: Sequence[np.ndarray],
    weight: float,
) -> list[np.ndarray]:
    """Draw the pictures in their order, each (H, W, 3) uint8."""
    requests = [
        Request(
            prompt=caption(data.names[subject], STYLES[style]),
            seed=seed,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            sampler="ddim",
            controls=[
                Control(net=NET, image=Image.fromarray(image), weight=weight, preprocessor="canny")
            ],
        )
        for seed, ((subject, style), image) in enumerate(zip(pairs, originals, strict=True))
    ]
    finished = pipeline.draw(requests, batch_size=BATCH)
    drawn = {each.request: np.asarray(each.image) for each in finished}
    return [drawn[index] for index in range(len(requests))]
