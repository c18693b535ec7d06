"""What a search of hyper-parameters came to, as a table in Markdown and as a plot.

The figures are those of `search.json`, which `python -m training search` writes.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import BackendError, install

COLOURS = {"random": "#f0a043", "tpe": "#2a78b5"}
NAMES = {
    "default": "the defaults",
    "random": "random search",
    "tpe": "TPE, ending those that fall behind",
}
PALE = "#888888"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # that the plot names


def table(report: Mapping[str, Any]) -> str:
    """Return the figures as Markdown: the searches, the parameters, the longer trainings."""
    return "\n\n".join(
        "\n".join(lines)
        for lines in (_heading(report), _searches(report), _values(report), _last(report))
    )


def figure(report: Mapping[str, Any]) -> Any:
    """Draw the best loss over the minutes, every complete trial, and the importances.

    Returns matplotlib's figure; raises BackendError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError(
            f"the plot needs matplotlib; {install('matplotlib', 'search')}"
        ) from None
    drawn = Figure(figsize=(8.0, 3.2), layout="constrained")
    progress, rates, shares = drawn.subplots(1, 3)
    _draw_progress(progress, report)
    _draw_rates(rates, report)
    found = report["importances"]
    shares.barh(list(found)[::-1], list(found.values())[::-1], color=COLOURS["tpe"], height=0.6)
    shares.set_xlabel("share of the variance")
    if not found:
        shares.text(0.5, 0.5, "too few trials", ha="center", va="center", color=PALE)
    for axes in (progress, rates, shares):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    request = report["request"]
    drawn.suptitle(
        f"Search of hyper-parameters: trials of {request['trial_minutes']:g} minutes",
        x=0.01, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    return drawn


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `search.md` and `search.png` into a folder; return their paths."""
    page, plot = folder / "search.md", folder / "search.png"
    page.write_text(table(report) + "\n", encoding="utf-8")
    figure(report).savefig(plot, dpi=150)
    return [page, plot]


def _draw_progress(axes: Any, report: Mapping[str, Any]) -> None:
    """Draw a line for each search: the least loss of its trials so far."""
    if losses := _known(report["searches"]["default"], "validation"):
        middle = statistics.median(losses)
        axes.axhline(middle, color=PALE, linestyle="--", linewidth=1, label="default")
    for way, colour in COLOURS.items():
        for number, found in enumerate(report["searches"][way]):
            minutes, least = zip(*_least(found["trials"]), strict=True)
            label = way if number == 0 else None
            axes.step(minutes, least, where="post", color=colour, linewidth=1.2, label=label)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("best validation loss")
    axes.legend(frameon=False, fontsize=8)


def _least(trials: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield (minutes, least loss) after each trial; not a number before one came to its end."""
    seconds, least = 0.0, float("nan")
    for trial in trials:
        seconds += trial["seconds"]
        if trial["state"] == "complete":
            least = min(trial["losses"][-1], least)
        yield seconds / 60, least


def _draw_rates(axes: Any, report: Mapping[str, Any]) -> None:
    """Draw the loss of complete trials over the learning rate; crosses are AdamW's."""
    for way, colour in COLOURS.items():
        trials = [trial for found in report["searches"][way] for trial in found["trials"]]
        for muon, mark in ((True, "o"), (False, "x")):
            points = [
                (trial["parameters"]["learning_rate"], trial["losses"][-1])
                for trial in trials
                if trial["state"] == "complete" and trial["parameters"]["muon"] is muon
            ]
            axes.plot(*zip(*points, strict=True) if points else ([], []), mark, color=colour,
                      markersize=4)  # fmt: skip
    axes.plot([], [], "o", color=PALE, markersize=4, label="Muon")
    axes.plot([], [], "x", color=PALE, markersize=4, label="AdamW")
    axes.set_xscale("log")
    axes.set_xlim(RATES[0] / 1.2, RATES[-1] * 1.2)
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False, fontsize=8)


def _heading(report: Mapping[str, Any]) -> list[str]:
    request = report["request"]
    parts = ", ".join(f"{count} for {name}" for name, count in request["subjects"].items())
    return [
        f"Subjects: {parts}. Each search has {request['minutes']:g} minutes of training in trials "
        f"of {request['trial_minutes']:g}, on {request['device']} with {request['threads']} "
        f"threads; torch {request['torch']}, optuna {request['optuna']}. Losses are mean squared "
        "errors in v."
    ]


def _searches(report: Mapping[str, Any]) -> list[str]:
    seeds = report["request"]["seeds"]
    lines = [
        f"| | trials, ended early | validation loss of the best, {seeds} seeds | median | "
        "test loss, median |",
        "|---|---|---|---|---|",
    ]
    for way, name in NAMES.items():
        found = report["searches"][way]
        trials = [trial for each in found for trial in each["trials"]]
        early = sum(trial["state"] == "pruned" for trial in trials)
        losses = ", ".join(_loss(each["validation"]) for each in found)
        middle, tested = (_middle(found, part) for part in ("validation", "test"))
        lines.append(f"| {name} | {len(trials)}, {early} | {losses} | {middle} | {tested} |")
    return lines


def _values(report: Mapping[str, Any]) -> list[str]:
    lines = ["| | searched | default | best | importance |", "|---|---|---|---|---|"]
    default, found = (report["final"][name]["parameters"] for name in ("default", "best"))
    for name, searched in report["ranges"].items():
        share = report["importances"].get(name)
        cells = (searched, _value(default[name]), _value(found[name]))
        shown = "—" if share is None else f"{share:.0%}"
        lines.append(f"| {name} | {' | '.join(cells)} | {shown} |")
    return lines


def _last(report: Mapping[str, Any]) -> list[str]:
    request = report["request"]
    lines = [
        f"| trained for {request['final_minutes']:g} minutes with | validation | test | "
        f"{request['held_out']} held-out pairs | nearest of them | among five |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in report["final"].items():
        losses = (_loss(found[part]) for part in ("validation", "test", "held_out"))
        shares = (_share(found[part]) for part in ("top_1", "top_5"))
        title = NAMES.get(name, "the best parameters")
        lines.append(f"| {title} | {' | '.join((*losses, *shares))} |")
    return lines


def _middle(found: Sequence[Mapping[str, Any]], part: str) -> str:
    losses = _known(found, part)
    return _loss(statistics.median(losses) if losses else None)


def _known(found: Sequence[Mapping[str, Any]], part: str) -> list[float]:
    """Return the losses of the searches in which a trial came to its end."""
    return [each[part] for each in found if each[part] is not None]


def _loss(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()
