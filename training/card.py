"""What stands beside a shipped model: its card (README.md) and whom its data is owed to (NOTICE).

Everything is read from the working folder, so the card says what was run and measured there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import vocabulary
from training.dataset import EVERYDAY_SHARE, PICTOGRAMS
from training.loop import spent
from training.packages import PACKAGES, Package
from training.pictograms import SIZE

TRAININGS = ("autoencoder", "diffusion")
CC_BY = (
    "The graphics of {name} are copyright\n{author}, licensed under CC BY 4.0\n"
    "(https://creativecommons.org/licenses/by/4.0/). They were changed: rendered to pixels,\n"
    "which the model was trained on; what it draws may resemble them.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Which pictograms there are: held_out (subjects, styles) bool, everyday (subjects,) bool."""

    held_out: np.ndarray
    everyday: np.ndarray


def write_card(out: Path, work: Path) -> None:
    """Write README.md and NOTICE into the model's folder `out`, from the working folder `work`."""
    data = _read_data(work / PICTOGRAMS)
    (out / "README.md").write_text(_readme(out, work, data), encoding="utf-8")
    (out / "NOTICE").write_text(_notice(pictograms=data is not None), encoding="utf-8")


def _readme(out: Path, work: Path, data: Data | None) -> str:
    weights = sum(path.stat().st_size for path in out.glob("*/*.safetensors")) / 1e6
    previews = ""
    if (out / "preview_decoder").is_dir():
        previews = (
            "\n\n`preview_decoder/` draws pictures on the way; it was distilled from the decoder "
            "with `python -m training preview --out FOLDER`."
        )
    sections = (
        f"# {out.name}\n\n"
        f"A small latent-diffusion model: prompt to {SIZE} × {SIZE} pixels, "
        f"{weights:.0f} MB of float16 weights in diffusers' folder layout "
        "(diffusers runs them on a processor with `torch_dtype=torch.float32`).",
        f"## Data\n\n{_data(data)}",
        f"## Training\n\n{_training(work, data)}{previews}",
        f"## Quality\n\n{_quality(work, pictograms=data is not None)}",
        f"## Limits\n\n{_limits(pictograms=data is not None)}",
        "## Licence\n\nApache-2.0, as the project. NOTICE names the licences of the data.",
    )
    return "\n\n".join(sections) + "\n"


def _read_data(path: Path) -> Data | None:
    """Return which pictograms there are, or None for captioned pictures."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Data(held_out=arrays["held_out"], everyday=arrays["everyday"])


def _data(data: Data | None) -> str:
    if data is None:
        return (
            "Captioned pictures that whoever trained the model brought; "
            "their licences are not known here."
        )
    held_out, everyday = data.held_out, int(data.everyday.sum())
    subjects, styles = held_out.shape
    share = ""
    if everyday < subjects:
        share = (
            f" {everyday} subjects are everyday ones and have {EVERYDAY_SHARE:.0%} of the draws."
        )
    rows = "\n".join(
        f"| {package.style or 'words'} | {package.name} {package.version} | {package.licence} "
        f"| {package.author} |"
        for package in PACKAGES
    )
    return (
        f"{subjects} subjects, each drawn in {styles} styles; {int(held_out.sum())} of the "
        f"{held_out.size} pictures are held out of training.{share}\n\n"
        f"| style | npm package | licence | author |\n|---|---|---|---|\n{rows}\n\n"
        "Captions are made of a subject's name, its keywords and the word of the style: "
        "`red apple, noto style`."
    )


def _training(work: Path, data: Data | None) -> str:
    every = data is not None and not data.everyday.all()
    lines, notes = [f"python -m training data{' --all' * every}"], []
    for name in TRAININGS:
        record = _read_json(work / f"{name}.json")
        options = record.get("options", {})
        flags = (f"--{key.replace('_', '-')} {value}" for key, value in options.items())
        lines.append(" ".join([f"python -m training {name}", *flags]))
        notes.append(f"- {name}: {_spent(work / f'{name}.pt')}; {_account(record)}")
    lines.append("python -m training ship --out FOLDER")
    return "\n".join(["```", *lines, "```", "", *notes])


def _account(record: dict[str, Any]) -> str:
    """Tell the seed, and what the command does not: a record may hold a `note` in words."""
    seed = record.get("options", {}).get("seed")
    origin = f"seed {seed}" if seed is not None else "its options were not recorded"
    return f"{origin}. {record['note']}" if "note" in record else f"{origin}."


def _spent(checkpoint: Path) -> str:
    if not checkpoint.exists():
        return "its checkpoint was not kept"
    steps, seconds = spent(checkpoint)
    return f"{steps:,} steps, {seconds / 60:.0f} minutes of computing"


def _quality(work: Path, *, pictograms: bool) -> str:
    lines = []
    record = _read_json(work / "autoencoder.json")
    report = _read_json(work / "quality.json")
    if "autoencoder_psnr" in report:
        lines.append(
            f"- The autoencoder's reconstructions of {report['held_out']['pictures']} pictures "
            f"held out of training: {report['autoencoder_psnr']:.1f} dB PSNR."
        )
    elif "psnr" in record:
        pictures = f" of {record['pictures']} pictures" if "pictures" in record else ""
        lines.append(
            f"- The autoencoder's reconstructions{pictures}: {record['psnr']:.1f} dB PSNR."
        )
    for kind, text in (("held_out", "pairs held out of training"), ("trained", "trained pairs")):
        if kind in report:
            shares = report[kind]
            lines.append(
                f"- Of {shares['pictures']} {text}, the picture drawn is nearest to the original "
                f"it was asked for in {shares['top_1']:.1%} (top-1) and among the nearest five in "
                f"{shares['top_5']:.1%} (top-5)."
            )
    if "few_steps" in report:
        share = f"{report['few_steps']['top_1']:.1%}"
        how = "without guidance, by the LoRA of few steps" if report.get("few_steps_lora") else ""
        lines.append(
            f"- Drawn in 4 steps{how and ' ' + how}, {share} of the held-out pairs are nearest "
            "(top-1)."
        )
    if "copied" in report:
        best = report["copied"]["all"]
        lines.append(
            "- The original of the same subject in the best other style, in the place of the "
            f"picture drawn: {best['top_1']:.1%} (top-1) and {best['top_5']:.1%} (top-5)."
        )
    if "sharpness" in report:
        lines.append(
            "- Sharpness, the mean difference of neighbouring pixels in drawn held-out pairs: "
            f"{report['sharpness']:.0%} of the originals'."
        )
    if report:
        settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
        seeds = f"; means over {len(report['seeds'])} seeds" if "seeds" in report else ""
        lines.append(f"- Distance: RGB averaged over 8 × 8 pixels. Drawn with {settings}{seeds}.")
    elif pictograms:
        lines.append("- The match of text and picture is not measured yet.")
    return "\n".join(lines) or "Not measured."


def _limits(*, pictograms: bool) -> str:
    common = f"It draws {SIZE} × {SIZE} pixels; other sizes were not trained. English prompts only."
    if not pictograms:
        return f"{common} It knows what the pictures and captions of its training show, no more."
    return (
        f"{common} It draws the everyday subjects of its data, one at a time, on white: no "
        "photographs, scenes, counts, places in the picture or writing. Words outside its data "
        "mean little to it. It is there to try and to test the engine, not to be a product."
    )


def _notice(*, pictograms: bool) -> str:
    entries = [_entry(package) for package in PACKAGES] if pictograms else []
    if not pictograms:
        entries.append(
            "Captioned pictures of whoever trained the model; add their licences here.\n"
        )
    entries.append(
        f"Vocabulary: {vocabulary.WHEEL_PROJECT} {vocabulary.WHEEL_VERSION} (PyPI)\n"
        f"Licence: {vocabulary.WHEEL_LICENCE}\nAuthor: {vocabulary.WHEEL_AUTHOR}\n"
    )
    return "\n".join(["This model was made from the following.\n", *entries])


def _entry(package: Package) -> str:
    text = (
        f"{package.name} {package.version} (npm)\n"
        f"Licence: {package.licence}\nAuthor: {package.author}\n"
    )
    if package.licence == "CC-BY-4.0":
        text += CC_BY.format(name=package.name, author=package.author)
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
