"""The optimisation loop that all trainings share: schedule, clipping, EMA, checkpoints.

On a GPU, losses and gradients are recorded once as a CUDA graph and replayed at every step: what is
random in them comes from torch's own generator of that GPU, and nothing in them may wait for it.
"""

import copy
import math
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import RequestError
from training import devices
from training.devices import Losses
from training.muon import Muon, is_hidden_matrix


class DivergenceError(RequestError):
    """A training's loss is no finite number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Choices of one training.

    It ends after `steps`, or after `minutes` of computing if that comes first; the learning rate
    rises over `warmup_steps` and falls as a cosine to nothing at the end, whichever end it is.
    batch_size: of all processes together; ema_decay: None for no average of the weights; stop: the
    part of the training, above 0 to 1, after which a run leaves off, for a later one to go on
    betas: of AdamW, how long the moments of gradients are remembered
    """

    steps: int
    minutes: float | None = None
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 200
    clip_norm: float = 1.0
    ema_decay: float | None = 0.999
    muon: bool = False  # orthogonalised momentum for the hidden matrices, AdamW for the rest
    save_seconds: float = 120.0
    sample_steps: int = 1000
    device: str = "cpu"
    seed: int = 0
    stop: float = 1.0
    records: bool = True  # whether a GPU's step is a CUDA graph: nothing in it may change its place

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        positive = ("steps", "batch_size", "learning_rate", "warmup_steps", "sample_steps")
        for name in positive:
            if getattr(self, name) <= 0:
                raise RequestError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.minutes is not None and self.minutes <= 0:
            raise RequestError(f"minutes is {self.minutes}; give a positive number, or none")
        if not 0 < self.stop <= 1:
            raise RequestError(f"stop is {self.stop}; give a number above 0, up to 1")
        devices.check_batch(self.batch_size)


class Loop:
    """Minimise a loss over a module's parameters, resuming from `checkpoint` when it is there.

    Parameters that need no gradient stay as they are, and the checkpoint does not hold them.
    """

    def __init__(self, module: nn.Module, settings: LoopSettings, checkpoint: Path) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.module = module.to(settings.device)
        self.ema = self.module if settings.ema_decay is None else _averaged(self.module)
        self.optimizers = _optimizers(self.module, settings)
        self.step = 0
        self.seconds = 0.0
        self._captures = settings.device.startswith("cuda") and settings.records
        self._captures = self._captures and devices.count() == 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._form: Hashable = None
        self._losses: Losses = {}
        self._saved = time.monotonic()
        if checkpoint.exists():
            self._resume()

    def run(
        self,
        losses: Callable[[int], Losses],
        *,
        sample: Callable[[nn.Module, int], None] | None = None,
        name: str = "",
        form: Callable[[], Hashable] = lambda: None,
    ) -> nn.Module:
        """Call `losses(step)` until the end or `stop`; return the EMA of the module.

        form: what changes when the shapes in `losses` do
        Raises DivergenceError when the loss is no finite number.
        """
        from tqdm import tqdm

        bar = tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=name,
            mininterval=5,
            disable=not devices.is_first(),
        )
        losses = devices.distributed(self.module, losses)
        last = time.monotonic()
        while self.fraction() < self.settings.stop:
            if self._captures:
                values = self._replay(losses, form())
                self._apply()
            else:
                values = losses(self.step)
                self._update(values["loss"])
            now = time.monotonic()
            self.seconds += now - last
            if self.settings.minutes is not None:
                self.seconds = devices.agreed(self.seconds)
            last = now
            bar.update()
            if self.step % 20 == 0:
                shown = {key: devices.mean(value) for key, value in values.items()}
                if not math.isfinite(shown["loss"]):
                    raise DivergenceError(
                        f"the loss is {shown['loss']} at step {self.step}; begin anew in another "
                        "working folder, with a smaller --learning-rate"
                    )
                bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()})
            if sample and self.step % self.settings.sample_steps == 0 and devices.is_first():
                sample(self.ema, self.step)
            if now - self._saved > self.settings.save_seconds:
                self.save()
            last = time.monotonic()
        bar.close()
        self.save()
        return self.ema

    def fraction(self) -> float:
        """Return how much of the training is done, 0 to 1."""
        done = self.step / self.settings.steps
        if self.settings.minutes is not None:
            done = max(done, self.seconds / 60 / self.settings.minutes)
        return min(done, 1.0)

    def learning_rate(self) -> float:
        """Warm up linearly, then follow half a cosine down to nothing."""
        warm = min(1.0, (self.step + 1) / self.settings.warmup_steps)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * self.fraction())).item())
        return self.settings.learning_rate * warm * cosine

    def save(self) -> None:
        """Write the whole state beside the old one, then rename: a kill loses no checkpoint."""
        if not devices.is_first():
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "module": _learnt(self.module, self.module),
                "ema": None if self.ema is self.module else _learnt(self.ema, self.module),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
            },
            partial,
        )
        partial.replace(self.checkpoint)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
        self._load(self.module, state["module"])
        if self.ema is not self.module:
            self._load(self.ema, state["ema"] or state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def _load(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        expected = _learnt(self.module, self.module)
        if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in expected.items()}:
            raise RequestError(
                f"{self.checkpoint} is of another training than this one; give another --work"
            )
        module.load_state_dict(saved, strict=False)

    def _update(self, loss: Tensor) -> None:
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        self._apply()

    def _replay(self, losses: Callable[[int], Losses], form: Hashable) -> Losses:
        """Compute losses and gradients by a recorded graph, recorded anew for another form."""
        if self._graph is None or form != self._form:
            self._record(losses)
            self._form = form
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _record(self, losses: Callable[[int], Losses]) -> None:
        """Record one step's losses and gradients; PyTorch wants some runs on a stream before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.module.zero_grad(set_to_none=True)
                losses(self.step)["loss"].backward()
        torch.cuda.current_stream().wait_stream(side)
        self.module.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = losses(self.step)
            self._losses["loss"].backward()

    def _apply(self) -> None:
        """Move the weights along their gradients, and the average along the weights."""
        torch.nn.utils.clip_grad_norm_(
            self.module.parameters(), self.settings.clip_norm, foreach=True
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
        self.step += 1
        if self.settings.ema_decay is None:
            return
        # The average starts short, so that the first steps' noise is forgotten.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = zip(self.ema.parameters(), self.module.parameters(), strict=True)
        averages, weights = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)


def spent(checkpoint: Path) -> tuple[int, float]:
    """Return the steps and the seconds of computing that a checkpoint of a loop has behind it."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return state["step"], state["seconds"]


def _averaged(module: nn.Module) -> nn.Module:
    """Copy a module's parameters that learn, for their average; the others are shared."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, dict(shared)).eval().requires_grad_(False)


def _learnt(module: nn.Module, learning: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, less the parameters that do not learn in `learning`."""
    fixed = {name for name, value in learning.named_parameters() if not value.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in fixed}


def _optimizers(module: nn.Module, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or for what Muon leaves to it."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if settings.muon and is_hidden_matrix(n, p)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    rate, decay = settings.learning_rate, settings.weight_decay
    fused = settings.device.startswith("cuda")
    adamw = torch.optim.AdamW(rest, lr=rate, betas=settings.betas, weight_decay=decay, fused=fused)
    return [adamw, Muon(matrices, lr=rate, weight_decay=decay)] if matrices else [adamw]


def draw(choices: int, count: int, weights: Tensor | None, device: torch.device) -> Tensor:
    """Draw indices (count,) int64 below `choices`, in proportion to weights (choices,) if given."""
    if weights is None:
        return torch.randint(choices, (count,), device=device)
    sums = weights.cumsum(0)
    at = torch.rand(count, device=device, dtype=sums.dtype) * sums[-1]
    return torch.searchsorted(sums, at, right=True).clamp(max=choices - 1)


def autocast(device: str) -> torch.autocast:
    """bfloat16 where it is safe; parameters, normalisation and losses stay float32.

    On a GPU weights are cast anew in each use, since a recorded graph must hold their casts.
    """
    kind = device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, cache_enabled=kind == "cpu")


def attention(device: str) -> AbstractContextManager[None]:
    """Choose the kernel of attention: on CPUs the plain one trains short sequences faster.

    Measured with the shipped model's shapes, batch 32 to 64: 1.13 to 1.16 times the samples a
    second of the fused kernel, whose backward pass is the slow part.
    """
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
