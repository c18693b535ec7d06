"""Plots of the committed figures, as SVG files that say which figures they were made of."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report as reports
from benchmarks.contenders import PEAK, REFERENCE
from benchmarks.quality import LARGEST_DB, REFERENCE_NAME
from benchmarks.scale import AXES, along
from benchmarks.scenarios import WHOLE
from engine.errors import BackendError, OutputError, install
from training import search_report

PLOTS = Path(__file__).parent.parent / "docs" / "plots"
OURS = "latentrt, "
WIDTH_IN = 8.0  # 800 pixels at the 100 dots an inch that it is shown at
COLOURS = {"text encoder": "#8aa6b5", "UNet": "#2a78b5", "decoder": "#f0a043"}
SHADES = ("#c9d6de", "#8aa6b5", "#f0a043", "#2a78b5")
WAITS = {"first_step_s": "first step", "whole_s": "whole picture"}
INK, PALE = "#333333", "#dddddd"
STYLE = {
    "svg.hashsalt": "latentrt",  # otherwise names inside the file are drawn by chance
    "svg.fonttype": "path",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A drawing of one report or several, which it takes in their order."""

    reports: tuple[str, ...]
    draw: Callable[..., Any]

    def figures(self) -> str | None:
        """Name the figures by their files' SHA-256; None where there are none yet."""
        files = [reports.RESULTS / f"{name}.json" for name in self.reports]
        if not all(file.is_file() for file in files):
            return None
        return "; ".join(
            f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files
        )


def draw(folder: Path = PLOTS) -> list[Path]:
    """Draw all plots whose figures are there; raises BackendError without matplotlib."""
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError:
        raise BackendError(f"the plots need matplotlib; {install('matplotlib', 'bench')}") from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, plot in DRAWN.items():
        if figures := plot.figures():
            path = folder / f"{title}.svg"
            style: Any = {**mpl.rcParamsDefault, **STYLE}
            with mpl.rc_context(style):
                figure = plot.draw(*(reports.committed(name) for name in plot.reports))
                about = {"Description": figures, "Date": None, "Creator": None}
                figure.savefig(path, metadata=about, bbox_inches="tight")
            written.append(path)
    return written


def outdated(folder: Path = PLOTS) -> list[str]:
    """Return the plots that are missing, or were made of other figures than the committed."""
    return [
        name
        for name, plot in DRAWN.items()
        if (figures := plot.figures())
        and not (
            (path := folder / f"{name}.svg").is_file()
            and figures in path.read_text(encoding="utf-8")
        )
    ]


def time_by_part(report: Mapping[str, Any]) -> Any:
    """Draw a bar for each contender, the fastest first, of its parts' medians."""
    steps = report["request"]["steps"]
    bars = {}
    for name, found in report["contenders"].items():
        parts = found.get("parts", {})
        if name != PEAK and "step" in parts:
            text, step, decode = (parts[part]["median"] for part in ("text", "step", "decode"))
            bars[name] = (text, steps * step, decode)
    order = sorted(bars, key=lambda name: -sum(bars[name]))
    figure, (axes,) = _figure(0.42 * len(bars) + 1.2)
    left = [0.0] * len(bars)
    for i, (part, colour) in enumerate(COLOURS.items()):
        widths = [bars[name][i] for name in order]
        title = f"{part}, {steps} steps" if part == "UNet" else part
        axes.barh(order, widths, left=left, color=colour, height=0.62, label=title)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total + 0.01 * max(left), row, _seconds(total), va="center")
    _name_rows(axes, order)
    axes.set_xlim(0, 1.1 * max(left))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)
    size, threads = report["request"]["size"], report["request"]["threads"]
    _title(
        figure,
        f"{report['request']['model']}: parts of a request, {size} × {size}, {threads} threads",
    )
    return figure


def speed_against_quality(latency: Mapping[str, Any], quality: Mapping[str, Any]) -> Any:
    """Draw each setting's time of a request against how near its pictures are to float32's."""
    times = {
        name.removeprefix(OURS): found["parts"][WHOLE]["median"]
        for name, found in latency["contenders"].items()
        if name.startswith(OURS) and "parts" in found
    }
    points = {REFERENCE_NAME: (times[REFERENCE.removeprefix(OURS)], LARGEST_DB)}
    for name, found in quality["settings"].items():
        beside = found.get("beside")
        if "psnr_db" in found and name in times:
            points[name] = (times[name], found["psnr_db"]["median"])
        elif "psnr_db" in found and beside in times:
            seconds = times[beside] / found["times_faster"]["median"]
            points[name] = (seconds, found["psnr_db"]["median"])
    figure, (axes,) = _figure(3.6)
    largest = max(seconds for seconds, _ in points.values())
    order = sorted(points, key=lambda name: points[name])
    for number, name in enumerate(order, start=1):
        axes.plot(*points[name], "o", color=COLOURS["UNet"], markersize=13)
        axes.annotate(
            str(number), points[name], color="white", fontsize=8, ha="center", va="center_baseline"
        )
        row = f"{number}  {name}, {_seconds(points[name][0])}"
        place = (1.02, 1 - 0.09 * number)
        axes.text(*place, row, transform=axes.transAxes, fontsize=8, va="center")
    axes.set_xlim(0, 1.1 * largest)
    axes.set_ylim(0, 1.08 * LARGEST_DB)
    axes.set_xlabel("seconds a picture")
    axes.set_ylabel("PSNR against float32, median, dB")
    axes.grid(color=PALE, linewidth=0.6)
    _title(figure, f"{quality['request']['model']}: speed against quality (upper left is better)")
    return figure


def scaling(report: Mapping[str, Any]) -> Any:
    """Draw the time along each axis, from the smallest of the rounds to the largest."""
    lines = {axis: found for axis in AXES if len(found := along(report, axis)) > 1}
    figure, all_axes = _figure(2.6, columns=max(len(lines), 1))
    for axes, (axis, found) in zip(all_axes, lines.items(), strict=False):
        places = range(len(found))
        times = [taken["seconds"] for taken in found.values()]
        medians = [each["median"] for each in times]
        axes.fill_between(
            places, [t["min"] for t in times], [t["max"] for t in times], color=PALE, linewidth=0
        )
        axes.plot(places, medians, "o-", color=COLOURS["UNet"])
        for place, median in zip(places, medians, strict=True):
            axes.annotate(
                _seconds(median), (place, median), xytext=(4, 7), textcoords="offset points",
                ha="right", fontsize=8,
            )  # fmt: skip
        axes.set_xticks(list(places), [str(value) for value in found])
        axes.set_xlabel(AXES[axis])
        axes.set_ylim(0, 1.2 * max(t["max"] for t in times))
        axes.set_xlim(-0.7, len(found) - 0.6)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
    request = report["request"]
    _title(
        figure,
        f"{request['model']}, {request['backend']} in {request['precision']}: "
        f"seconds for {request['timed']}",
    )
    return figure


def serving(report: Mapping[str, Any]) -> Any:
    """Draw the waits of mixed requests under load, and what each way gains on other machines.

    Raises OutputError where one of the two is not measured.
    """
    if lacking := [part for part in ("load", "simulation") if part not in report]:
        raise OutputError(f"the figures of serving lack {' and '.join(lacking)}; measure them too")
    figure, (waits, gains) = _figure(3.4, columns=2)
    load, contenders = next(iter(report["load"]["mixes"]["mixed"]["loads"].items()))
    places = range(len(contenders))
    for offset, (what, text) in zip((-0.2, 0.2), WAITS.items(), strict=True):
        found = [told["figures"][what]["p95"] for told in contenders.values()]
        colour = COLOURS["UNet" if offset < 0 else "decoder"]
        waits.barh([p + offset for p in places], found, height=0.36, color=colour, label=text)
        for place, seconds in zip(places, found, strict=True):
            waits.text(seconds, place + offset, f" {_seconds(seconds)}", va="center", fontsize=8)
    labels = [name.replace(", ", ",\n").replace(" (", "\n(") for name in contenders]
    waits.set_yticks(list(places), labels, fontsize=8)
    waits.invert_yaxis()
    waits.set_xlabel(f"seconds at p95, load {load}")
    waits.margins(x=0.2)
    curves = report["simulation"]["curves"]
    names = next(iter(curves.values()))["capacity"]["equal"]
    for place, name in enumerate(names):
        found = [curve["capacity"]["mixed"][name] for curve in curves.values()]
        offsets = [number + 0.2 * (place - 1.5) for number in range(len(curves))]
        gains.bar(offsets, found, width=0.18, label=name, color=SHADES[place])
    labels = [name.replace(", ", "\n").replace(" (", "\n(") for name in curves]
    gains.set_xticks(range(len(curves)), labels, fontsize=7)
    gains.set_ylabel("capacity, of one at a time")
    gains.legend(frameon=False, fontsize=7, loc="upper left")
    waits.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    _title(figure, "Mixed requests: waits on this machine, and capacity on others (simulated)")
    return figure


def noise_schedules(report: Mapping[str, Any]) -> Any:
    """Draw the signal and the noise of each schedule along its timesteps."""
    figure, panels = _figure(2.9, columns=2)
    for axes, what in zip(panels, ("signal", "noise"), strict=True):
        for name, curve in report["schedules"].items():
            shipped = name == "pictogram"
            axes.plot(
                curve["time"], curve[what], label=f"{name}, which ships" if shipped else name,
                linewidth=2.4 if shipped else 1.3,
            )  # fmt: skip
        axes.set_xlabel("timestep t / T")
        axes.set_ylabel({"signal": "signal √ᾱ", "noise": "noise √(1 − ᾱ)"}[what])
        axes.grid(color=PALE, linewidth=0.6)
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    _title(figure, "The forward process: signal and noise over the steps")
    return figure


def loss_by_noise(report: Mapping[str, Any]) -> Any:
    """Draw the loss of the model that ships over its timesteps, with captions and without."""
    figure, (axes,) = _figure(2.9)
    for part, line in (("trained", "--"), ("held_out", "-")):
        for name, text, colour in (
            ("no_caption", "without captions", COLOURS["decoder"]),
            ("caption", "with captions", COLOURS["UNet"]),
        ):
            found, shown = report["loss"][part], f"{part.replace('_', ' ')}, {text}"
            axes.plot(
                found["timesteps"], found[name], f"o{line}", color=colour, markersize=4, label=shown
            )
    axes.set_xlabel("timestep: from a clean latent to noise")
    axes.set_ylabel("mean squared error in v")
    axes.set_ylim(bottom=0)
    axes.grid(color=PALE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    counts = report["request"]["loss_pictures"]
    _title(
        figure,
        f"The loss on {counts['trained']} trained and {counts['held_out']} held-out pictures",
    )
    return figure


def guidance_scale(report: Mapping[str, Any]) -> Any:
    """Draw how many pictures match and how far they are apart, over the guidance scale."""
    figure, (axes,) = _figure(2.9)
    points = report["guidance"]
    scales = [point["scale"] for point in points]
    for name, text, colour in (
        ("top_1", "nearest to the original asked for", COLOURS["UNet"]),
        ("diversity", "distance between pictures of a caption", COLOURS["decoder"]),
    ):
        values = [point[name] for point in points]
        axes.plot(scales, values, "o-", color=colour, markersize=4, label=text)
    axes.set_xscale("log")
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.minorticks_off()
    axes.set_xlabel("guidance scale")
    axes.set_ylim(0, 1.1 * max(max(point["top_1"], point["diversity"]) for point in points))
    axes.grid(color=PALE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    _title(figure, "Guidance: match against diversity")
    return figure


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _name_rows(axes: Any, names: list[str]) -> None:
    """Label bars, the project's own in bold."""
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name.startswith(OURS) else "normal")


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.{2 if value < 10 else 0}f} s"


DRAWN: Mapping[str, Plot] = {
    "time-by-part": Plot(reports=("latency",), draw=time_by_part),
    "time-by-part-sd15": Plot(reports=("latency-sd15",), draw=time_by_part),
    "speed-and-quality": Plot(reports=("latency", "quality"), draw=speed_against_quality),
    "scaling": Plot(reports=("scale",), draw=scaling),
    "scaling-sd15": Plot(reports=("scale-sd15",), draw=scaling),
    "serving": Plot(reports=("serving",), draw=serving),
    "search": Plot(reports=("search",), draw=search_report.figure),
    "noise-schedules": Plot(reports=("theory",), draw=noise_schedules),
    "loss-by-noise": Plot(reports=("theory",), draw=loss_by_noise),
    "guidance-scale": Plot(reports=("theory",), draw=guidance_scale),
}
