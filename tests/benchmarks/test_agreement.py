import copy
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.agreement import compared
from benchmarks.contenders import PEAK, REFERENCE
from engine.errors import RequestError

FAST, SAVING = "latentrt, OpenVINO bfloat16", "latentrt, OpenVINO int8, cache_interval=3"


def report(fast=(5.0, 5.2), reference=(10.0, 10.0), saving=(40.0, 42.0)):
    def parts(step):
        return {"text": 1.0, "step": step, "decode": 4.0}

    return {
        "machine": {"processor": "P", "cores": 2},
        "request": {"name": "sd15", "steps": 20},
        "contenders": {
            PEAK: {"rounds": [{"float32": 1.0}] * 2},
            REFERENCE: {"rounds": [parts(step) for step in reference]},
            FAST: {"rounds": [parts(step) for step in fast]},
            SAVING: {"rounds": [{"whole": seconds} for seconds in saving]},
        },
    }


def test_equal_runs_agree():
    found = compared(report(), report())
    assert found["exceeded"] == []
    assert found["ratios"][FAST][0] == {"min": round(105 / 205, 4), "max": round(109 / 205, 4)}
    assert found["ratios"][SAVING][0] == {"min": round(40 / 205, 4), "max": round(42 / 205, 4)}


def test_a_slower_machine_that_slows_all_agrees():
    assert compared(report(), report((10.1, 10.3), (20.5, 20.4), (80.0, 84.0)))["exceeded"] == []


def test_ratios_that_do_not_meet_are_named():
    assert compared(report(), report(fast=(6.0, 6.2)))["exceeded"] == [FAST]
    assert compared(report(fast=(6.0, 6.2)), report())["exceeded"] == [FAST]
    assert compared(report(), report(fast=(5.4, 5.6)))["exceeded"] == [], "a tie"


def test_contenders_of_one_run_alone_are_left_out():
    other = report()
    del other["contenders"][FAST]
    assert FAST not in compared(report(), other)["ratios"]


def test_what_cannot_be_compared():
    other = report()
    other["request"]["steps"] = 10
    with pytest.raises(RequestError, match="different requests"):
        compared(report(), other)
    other = copy.deepcopy(report())
    other["contenders"][REFERENCE]["rounds"] = []
    with pytest.raises(RequestError, match="no rounds of 'latentrt, ONNX Runtime float32'"):
        compared(report(), other)


def test_the_command(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(report()))
    second.write_text(json.dumps(report(fast=(8.0, 8.0))))
    assert main(["agree", str(first), str(first)]) == 0
    assert main(["agree", str(first), str(second)]) == 1
    assert FAST in capsys.readouterr().err
    assert main(["agree", str(first), str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
