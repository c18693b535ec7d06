"""Noise schedules and losses of the model in pixels, compared: trained alike, judged alike.

Each schedule is trained with one loss, and each loss with one schedule, one after the other. What
is done is kept after every variant, and a training goes on from its checkpoint, so the same command
goes on where it ended.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.backends.settings import BackendSettings
from engine.configs.diffusion import UNetConfig
from engine.errors import RequestError
from engine.graphs.graph import Part, graph_name
from engine.model import Model
from engine.store.cache import cache_folder, write_atomically
from export.writing import export_part
from runtime import Pipeline
from training import ddpm, judge
from training.idx import LabelledPictures
from training.loop import LoopSettings, spent

FIGURES, TABLE = "comparison.json", "comparison.md"
PARTS: tuple[Part, ...] = ("text_encoder", "step", "vae_decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A noise schedule and a loss, by their names in `training.ddpm`."""

    schedule: str
    loss: str

    @property
    def name(self) -> str:
        """Return what its folders and figures are called."""
        return f"{self.schedule}-{self.loss}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is the same for all variants.

    middle: whose loss all schedules have, and whose schedule all losses
    classes: names of the labels from 0 on; prediction: of `training.ddpm.PREDICTIONS`
    drawing: fields of `runtime.Request`, in the place of those of `training.judge.DRAWING`
    """

    middle: Variant
    classes: Sequence[str]
    prediction: str
    settings: LoopSettings
    judge_settings: LoopSettings
    drawing: Mapping[str, Any]
    unet: UNetConfig = ddpm.UNET

    def variants(self) -> list[Variant]:
        """Return the middle one among the schedules, then the other losses."""
        middle = self.middle
        schedules = [Variant(schedule=name, loss=middle.loss) for name in ddpm.SCHEDULES]
        losses = [Variant(schedule=middle.schedule, loss=name) for name in ddpm.LOSSES]
        return [*schedules, *(variant for variant in losses if variant != middle)]

    def described(self) -> dict[str, Any]:
        """Return what figures depend on, as JSON's values."""
        names = ("steps", "minutes", "batch_size", "learning_rate", "seed")
        return {
            "middle": self.middle.name,
            "classes": list(self.classes),
            "prediction": self.prediction,
            "training": {name: getattr(self.settings, name) for name in names},
            "judge": {name: getattr(self.judge_settings, name) for name in names},
            "drawing": {**judge.DRAWING, **self.drawing},
        }


def compare(
    comparison: Comparison,
    train_split: LabelledPictures,
    test_split: LabelledPictures,
    work: Path,
    out: Path,
) -> dict[str, Any]:
    """Train, draw and judge each variant that has no figures yet; return all figures.

    work: for figures and checkpoints; out: for the table and a folder with each variant's model
    Raises RequestError when `work` is of another comparison.
    """
    pictures = {"train": len(train_split.labels), "test": len(test_split.labels)}
    found = _begun(work / FIGURES, {**comparison.described(), "pictures": pictures})
    classes = comparison.classes
    referee = judge.train(train_split, len(classes), comparison.judge_settings, work)
    prompts = [classes[label] for label in test_split.labels]
    for variant in comparison.variants():
        if variant.name in found["variants"]:
            continue
        steps, seconds = _train(comparison, variant, train_split, work / variant.name, out)
        with opened(out / variant.name) as pipeline:
            drawn = judge.draw(pipeline, prompts, comparison.settings.seed, **comparison.drawing)
        found["variants"][variant.name] = {
            "schedule": variant.schedule,
            "loss": variant.loss,
            "steps": steps,
            "minutes": round(seconds / 60, 2),
            **judge.evaluate(referee, drawn, train_split, test_split),
        }
        _write(work / FIGURES, json.dumps(found, indent=2) + "\n")
        _write(out / TABLE, table(found) + "\n")
    return found


def _train(
    comparison: Comparison,
    variant: Variant,
    pictures: LabelledPictures,
    folder: Path,
    out: Path,
) -> tuple[int, float]:
    """Train a variant and write its model; return the steps and seconds of computing it took."""
    tokenizer = ddpm.class_tokenizer(folder / "tokenizer", comparison.classes)
    config = ddpm.scheduler(variant.schedule, comparison.prediction)
    trained = ddpm.train(
        pictures,
        tokenizer,
        comparison.classes,
        comparison.settings,
        folder,
        config=config,
        loss=variant.loss,
        unet=comparison.unet,
    )
    side = pictures.images.shape[1]
    ddpm.write(out / variant.name, trained.cpu(), folder / "tokenizer", config, side)
    return spent(folder / ddpm.CHECKPOINT)


def opened(model: Path) -> Pipeline:
    """Open a model that `training.ddpm` wrote, and trace the graphs that the cache lacks."""
    known, folder = Model.open(model), cache_folder() / "graphs"
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if not (folder / graph_name(part, known.config(part), "float32")).exists():
            export_part(known, part, "float32", folder)
    settings = BackendSettings(backend="cpu", threads=torch.get_num_threads())
    return Pipeline.load(model, settings=settings, precision="float32")


def table(found: Mapping[str, Any]) -> str:
    """Render the figures as Markdown: a row for each variant."""
    lines = [
        "| noise schedule | loss | steps | taken for their class | Fréchet distance, of the real "
        "test split's | diversity, of the real one |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["variants"].values():
        spread = row["diversity_of_real"]["features"]
        lines.append(
            f"| {row['schedule']} | {row['loss']} | {row['steps']:,} | {row['accuracy_drawn']:.1%} "
            f"| {row['times_the_floor']:.2f} times | {'—' if spread is None else f'{spread:.0%}'} |"
        )
    return "\n".join(lines)


def _begun(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that a former call left, or none yet; raises RequestError."""
    if not path.exists():
        return {"request": request, "variants": {}}
    try:
        former: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = former["request"] == request and isinstance(former["variants"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise RequestError(
            f"{path} is of another comparison; give another --work, or ask for the same as before"
        )
    return former


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))
