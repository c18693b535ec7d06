import hashlib
import json
import sys

import numpy as np
import pytest

from benchmarks import plots, report
from benchmarks.__main__ import main
from benchmarks.scale import base, chosen_points
from benchmarks.scenarios import Scenario
from engine.errors import BackendError


def scaling_report():
    """Figures of every point: a tenth of a second for each step of each picture."""
    scenario = Scenario.of("pictogram")
    middle = base(scenario, 2)
    points = {}
    for name, point in chosen_points(scenario, 2).items():
        shape = {axis: getattr(point, axis) for axis in ("batch", "size", "steps", "threads")}
        seconds = point.batch * point.steps / 10
        times = {"median": seconds, "min": 0.9 * seconds, "max": 1.1 * seconds}
        points[name] = {"rounds": [{"seconds": seconds}], "point": shape, "seconds": times}
    request = {
        "model": scenario.title,
        "backend": "cpu",
        "precision": "float32",
        "timed": "a whole request",
        "base": {axis: getattr(middle, axis) for axis in ("batch", "size", "steps", "threads")},
    }
    return {"request": request, "points": points}


def test_the_committed_plots_are_those_of_the_committed_figures():
    assert plots.outdated() == [], "run `python -m benchmarks report`"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the committed figures that plots are made of."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("latency", "quality"):
        text = (report.RESULTS / f"{name}.json").read_text(encoding="utf-8")
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "scale.json").write_text(json.dumps(scaling_report()), encoding="utf-8")
    monkeypatch.setattr(report, "RESULTS", folder)
    return folder


def test_other_figures_make_a_plot_out_of_date(results, tmp_path):
    names = ["time-by-part", "speed-and-quality", "scaling"]
    assert plots.outdated(tmp_path) == names, "there are none; those without figures do not count"
    for name in names:
        figures = plots.DRAWN[name].figures()
        (tmp_path / f"{name}.svg").write_text(f"<dc:description>{figures}</dc:description>")
    assert plots.outdated(tmp_path) == []
    digest = hashlib.sha256((results / "quality.json").read_bytes()).hexdigest()
    assert f"quality.json sha256:{digest}" in plots.DRAWN["speed-and-quality"].figures()
    (results / "quality.json").write_text("{}")
    assert plots.outdated(tmp_path) == ["speed-and-quality"]


def test_plots_are_drawn_the_same_each_time(results, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = plots.draw(tmp_path / "plots")
    assert [path.stem for path in drawn] == ["time-by-part", "speed-and-quality", "scaling"]
    before = [path.read_bytes() for path in drawn]
    assert all(len(data) < 10**5 for data in before)
    assert [path.read_bytes() for path in plots.draw(tmp_path / "plots")] == before
    assert plots.outdated(tmp_path / "plots") == []
    assert not any(b"<dc:date>" in data for data in before)


def test_bars_are_sorted_and_add_up(results):
    pytest.importorskip("matplotlib")
    latency = report.committed("latency")
    (axes,) = plots.time_by_part(latency).axes
    ends = [float(text.get_position()[0]) for text in axes.texts]
    assert ends == sorted(ends, reverse=True), "from the bottom up"
    contenders = latency["contenders"].values()
    measured = [found for found in contenders if "step" in found.get("parts", {})]
    assert len(ends) == len(measured)
    widths = sum(patch.get_width() for patch in axes.patches)
    totals = [
        found["parts"]["text"]["median"]
        + latency["request"]["steps"] * found["parts"]["step"]["median"]
        + found["parts"]["decode"]["median"]
        for found in measured
    ]
    assert widths == pytest.approx(sum(totals))


def test_a_saving_is_drawn_where_its_gain_puts_it(results):
    pytest.importorskip("matplotlib")
    latency, quality = report.committed("latency"), report.committed("quality")
    quality["settings"]["a saving"] = {
        "psnr_db": {"median": 29.0},
        "beside": "ONNX Runtime float32",
        "times_faster": {"median": 2.0},
    }
    (axes,) = plots.speed_against_quality(latency, quality).axes
    points = {tuple(np.concatenate(line.get_data())) for line in axes.lines}
    reference = latency["contenders"]["latentrt, ONNX Runtime float32"]["parts"]["whole"]["median"]
    assert (reference, 100.0) in points
    assert (reference / 2, 29.0) in points


def test_each_axis_of_a_scale_is_a_panel():
    pytest.importorskip("matplotlib")
    figure = plots.scaling(scaling_report())
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["pictures at once", "pixels along one side", "steps", "threads"]
    assert list(figure.axes[2].lines[0].get_ydata()) == [0.5, 1.0, 2.0, 4.0]


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"pip install matplotlib`.*'\.\[bench\]'"):
        plots.draw(tmp_path)


def test_the_report_writes_the_readme_and_the_plots(monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "PAGES", {readme: report.PAGES[report.README]})
    monkeypatch.setattr(plots, "draw", lambda: [tmp_path / "time-by-part.svg"])
    assert main(["report"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "time-by-part.svg")]
