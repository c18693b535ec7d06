import json

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from engine.errors import OutputError


def test_the_prompt_benchmark_measures_and_writes_json(tmp_path, capsys):
    out = tmp_path / "prompt.json"
    assert main(["prompt", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["request"]["steps"] == 20
    for name, summary in report.items():
        if name not in ("machine", "request"):
            assert 0 < summary["min"] <= summary["median"] <= summary["max"]


def test_no_repeats_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prompt", "--repeats", "0"])
    assert "give 1 or more" in capsys.readouterr().err


def test_an_unwritable_report_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.prompt.measure", lambda repeats: {"repeats": repeats})
    assert main(["prompt", "--out", str(tmp_path / "missing" / "prompt.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_readmes_table_is_that_of_the_committed_figures():
    readme = report.README.read_text(encoding="utf-8")
    assert report.insert(readme, report.committed()) == readme


def test_a_readme_without_a_place_for_the_table_is_refused():
    with pytest.raises(OutputError, match="put them back"):
        report.insert("# Latentrt", report.committed())
