"""A training in this process, or in this one of several: `python -m …distributed_training FOLDER`.

It draws what the whole batch draws, so that losses of one process and of several can be compared.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder, devices, diffusion
from training.loop import Loop, LoopSettings
from training.text_encoders import MAX_TOKENS
from training.vocabulary import cut_vocabulary, write_tokenizer

STEPS = 3
LOSSES = "losses.json"
TINY = dataclasses.replace(
    diffusion.UNET,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=96,
)


class Recorded(Loop):
    """Keeps the mean loss of all processes at every step."""

    losses: list[float] = []  # noqa: RUF012

    def _update(self, loss: torch.Tensor) -> None:
        self.losses.append(devices.mean(loss))
        super()._update(loss)


def train(folder: Path) -> list[float]:
    """Train on made latents for three steps; return the losses."""
    folder.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusion.Loop, Recorded.losses = Recorded, []
    try:
        with devices.processes("cpu") as device:
            _train(folder, device)
            if devices.is_first():
                (folder / LOSSES).write_text(json.dumps(Recorded.losses))
    finally:
        diffusion.Loop = Loop
        torch.set_num_threads(threads)
    return Recorded.losses


def _train(folder: Path, device: str) -> None:
    with devices.first_alone() as first:
        if first:
            vocabulary, merges = cut_vocabulary(["red"], 514, [])
            write_tokenizer(folder / "tokenizer", vocabulary, merges, MAX_TOKENS)
    latents = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    small = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
    diffusion.train(
        diffusion.Examples(latents=latents, captions=lambda index, rng: ("a red", "blue", "b")),
        Tokenizer.load(folder / "tokenizer"),
        Autoencoder(small).eval(),
        LoopSettings(steps=STEPS, minutes=5, batch_size=4, learning_rate=1e-3, device=device),
        folder,
        prompts=["red"],
        unet=TINY,
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]))
