"""A search of hyper-parameters: trials train on some subjects and are judged by others.

A trial is the training of `training.diffusion` in pieces, since its loop goes on from where it left
off. After each piece the validation loss is told to optuna (Akiba et al. 2019, arXiv:1907.10902):
its TPE (Bergstra et al. 2011) chooses the parameters of the next trial, and a median rule ends
those that fall behind. Random search with the same minutes of computing, and the defaults, stand
beside it. Every trial is a file, from which a search that was stopped goes on.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.configs.diffusion import UNetConfig
from engine.errors import RequestError
from export.modules.autoencoder import Autoencoder
from runtime.conditioning.tokenizer import Tokenizer
from training import diffusion
from training.denoising_loss import mean_loss
from training.diffusers_folder import write_json
from training.loop import DivergenceError, LoopSettings
from training.search_data import Measured, Splits

PIECES = 4  # of a trial, after each of which it may be ended
STARTUP = 4  # trials before any is ended, and before TPE chooses
SEARCHES = ("random", "tpe")
# Lowest and highest of what is searched, on a scale of logarithms or not; or all choices.
RANGES: dict[str, tuple[float, float, bool] | list[Any]] = {
    "learning_rate": (3e-4, 1e-2, True),
    "weight_decay": (0.01, 0.5, True),
    "batch_size": [16, 32, 48, 96],
    "warmup_steps": (10, 400, True),
    "ema_decay": (0.98, 0.9995, False),
    "muon": [True, False],
}

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of one set of values.

    losses: on the validation part, after each piece; seconds: of computing
    state: "running", "complete", "pruned" (ended early) or "diverged"
    """

    parameters: Parameters
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    state: str = "running"

    @property
    def loss(self) -> float:
        """The validation loss at the end; infinite where the trial did not come there."""
        return self.losses[-1] if self.state == "complete" else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """How trials are run.

    folder: for their files; minutes, steps: of a whole trial, which ends at what comes first
    """

    splits: Splits
    tokenizer: Tokenizer
    autoencoder: Autoencoder
    folder: Path
    minutes: float
    steps: int = 10**9
    device: str = "cpu"
    unet: UNetConfig = diffusion.UNET

    def run(
        self, name: str, parameters: Parameters, seed: int, told: Callable[[int, float], bool]
    ) -> Trial:
        """Train in pieces and write what came of it, or go on with a trial of this name.

        told: (piece, validation loss) -> whether to end the trial here; it hears of the pieces of
        earlier runs too. The learning rate follows the schedule of the whole trial.
        """
        trial = self.read(name) or Trial(parameters=parameters)
        for piece, loss in enumerate(trial.losses):
            told(piece, loss)
        while trial.state == "running":
            piece = len(trial.losses)
            began = time.monotonic()
            try:
                loss = self._train(name, trial.parameters, seed, piece)
            except DivergenceError:
                seconds = trial.seconds + time.monotonic() - began
                trial = dataclasses.replace(trial, seconds=seconds, state="diverged")
            else:
                ends = told(piece, loss)
                last = piece + 1 == PIECES
                trial = dataclasses.replace(
                    trial,
                    losses=(*trial.losses, loss),
                    seconds=_seconds(self._checkpoint(name)),
                    state="complete" if last else "pruned" if ends else "running",
                )
            write_json(self.folder / name / "trial.json", dataclasses.asdict(trial))
        self._checkpoint(name).unlink(missing_ok=True)
        return trial

    def read(self, name: str) -> Trial | None:
        """Return the trial of this name as far as it came; None where it was not begun."""
        path = self.folder / name / "trial.json"
        if not path.exists():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return Trial(**{**values, "losses": tuple(values["losses"])})

    def load(self, name: str) -> diffusion.Denoiser:
        """Return what a complete trial has trained."""
        denoiser = diffusion.Denoiser(self.tokenizer.vocab_size, self.unet).eval()
        denoiser.load_state_dict(torch.load(self._weights(name), weights_only=True))
        return denoiser.to(self.device)

    def forget(self, name: str) -> None:
        """Delete what a trial has trained, not what came of it."""
        self._weights(name).unlink(missing_ok=True)

    def loss(self, denoiser: diffusion.Denoiser, measured: Measured) -> float:
        """Return the loss on a part of the data."""
        return mean_loss(denoiser, measured.latents, measured.input_ids)

    def _train(self, name: str, parameters: Parameters, seed: int, piece: int) -> float:
        """Train one piece on; return the validation loss."""
        settings = LoopSettings(
            steps=self.steps,
            minutes=self.minutes,
            stop=(piece + 1) / PIECES,
            sample_steps=10**9,
            device=self.device,
            seed=seed,
            **parameters,
        )
        denoiser = diffusion.train(
            self.splits.train,
            self.tokenizer,
            self.autoencoder,
            settings,
            self.folder / name,
            prompts=[],
            unet=self.unet,
        )
        loss = self.loss(denoiser, self.splits.validation)
        if not math.isfinite(loss):
            raise DivergenceError(f"the validation loss is {loss}")
        if piece + 1 == PIECES:
            torch.save(denoiser.state_dict(), self._weights(name))
        return loss

    def _checkpoint(self, name: str) -> Path:
        return self.folder / name / "diffusion.pt"

    def _weights(self, name: str) -> Path:
        return self.folder / name / "weights.pt"


def default_parameters(batch_size: int, learning_rate: float) -> Parameters:
    """Return what `python -m training diffusion` takes where nothing is said."""
    values = {each.name: each.default for each in dataclasses.fields(LoopSettings)}
    values |= {"batch_size": batch_size, "learning_rate": learning_rate, **diffusion.OPTIMISATION}
    return {name: values[name] for name in RANGES}


def search(
    trials: Trials, way: str, minutes: float, seed: int, count: int | None = None
) -> dict[str, Trial]:
    """Run trials one of SEARCHES until their computing comes nearest to so many minutes.

    seed: of the search and of every training; count: trials at most
    Returns the trials by their names, and keeps of all that they trained the best's.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states, found = optuna.trial.TrialState, dict[str, Trial]()
    pruner: Any = optuna.pruners.NopPruner()
    if way == "tpe":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=0)
    study = optuna.create_study(pruner=pruner)
    while (count is None or len(found) < count) and (
        sum(trial.seconds for trial in found.values()) + 30 * trials.minutes < 60 * minutes
    ):
        name = f"{way}-{seed}-{len(found):03d}"
        study.sampler = _sampler(way, seed, len(found))
        if begun := trials.read(name):
            study.enqueue_trial(dict(begun.parameters))
        asked = study.ask(distributions())

        def told(piece: int, loss: float, asked: Any = asked) -> bool:
            asked.report(loss, piece)
            return bool(asked.should_prune())

        trial = trials.run(name, asked.params, seed, told)
        found[name] = trial
        if trial.state == "complete":
            study.tell(asked, trial.loss)
        else:
            state = states.PRUNED if trial.state == "pruned" else states.FAIL
            study.tell(asked, state=state)
        for other in found:
            if other != best(found):
                trials.forget(other)
    return found


def best(found: Mapping[str, Trial]) -> str | None:
    """Return the name of the trial with the least loss; None where none came to its end."""
    name = min(found, key=lambda name: found[name].loss, default=None)
    return None if name is None or math.isinf(found[name].loss) else name


def best_of_all(searches: Sequence[Mapping[str, Trial]]) -> Trial:
    """Return the best trial of several searches; raises RequestError where none came to its end."""
    every = [trial for found in searches for trial in found.values()]
    chosen = min(every, key=lambda trial: trial.loss, default=None)
    if chosen is None or math.isinf(chosen.loss):
        raise RequestError("no trial came to its end; give more --minutes than --trial-minutes")
    return chosen


def importances(searches: Sequence[Mapping[str, Trial]]) -> dict[str, float]:
    """Return how much of the losses' variance each parameter explains, the largest share first.

    By a forest of trees over all complete trials (fANOVA; Hutter, Hoos & Leyton-Brown 2014).
    Empty where fewer than STARTUP trials came to their end or all came to the same.
    """
    import optuna

    study = optuna.create_study()
    complete = [t for found in searches for t in found.values() if t.state == "complete"]
    if len(complete) < STARTUP or len({trial.loss for trial in complete}) < 2:
        return {}
    for trial in complete:
        params, ranges = dict(trial.parameters), distributions()
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=ranges, value=trial.loss)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def distributions() -> dict[str, Any]:
    """Return RANGES as optuna's distributions."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    made: dict[str, Any] = {}
    for name, wanted in RANGES.items():
        if isinstance(wanted, list):
            made[name] = CategoricalDistribution(wanted)
        else:
            low, high, log = wanted
            if isinstance(low, int):
                made[name] = IntDistribution(low, int(high), log=log)
            else:
                made[name] = FloatDistribution(low, high, log=log)
    return made


def _sampler(way: str, seed: int, number: int) -> Any:
    """Return what draws one trial's parameters, the same whether a search was stopped or not."""
    import optuna

    drawn = int(np.random.SeedSequence([SEARCHES.index(way), seed, number]).generate_state(1)[0])
    if way == "random":
        return optuna.samplers.RandomSampler(seed=drawn)
    return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=STARTUP)


def _seconds(checkpoint: Path) -> float:
    """Return the computing that a training's checkpoint has behind it."""
    state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    return float(state["seconds"])
