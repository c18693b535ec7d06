import json
from importlib.util import find_spec

import pytest

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from benchmarks import bfloat16
from benchmarks.resource_tables import bfloat16_table
from engine.backends.openvino.library import capabilities
from engine.errors import RequestError
from tests.support.openvino_engines import MODEL, graph_of, step_inputs

able = pytest.mark.skipif("BF16" not in capabilities(), reason="no bfloat16 arithmetic")
NORMS = "these and layer norms"


@able
def test_marked_operations_are_in_float32():
    norms = {}
    for name in (bfloat16.DEFAULT, NORMS):
        engine = type("Case", (bfloat16._KeepingEngine,), {"case": bfloat16.CASES[name]})(
            graph_of("step"), dict(MODEL.weights("step")), 1, "bfloat16"
        )
        engine.run(step_inputs(4, 4))
        infos = [node.get_rt_info() for node in engine._compiled.get_runtime_model().get_ops()]
        norms[name] = [
            info["runtimePrecision"].astype(str)
            for info in infos
            if info["layerType"].astype(str) == "MVN"
        ].count("f32")
    assert norms == {bfloat16.DEFAULT: 0, NORMS: 14}


@able
def test_the_cases_of_a_file_are_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(bfloat16, "PICTURES", 1)
    monkeypatch.setattr(bfloat16, "STEPS", 1)
    machine = {"processor": "a processor", "cores": 1}
    monkeypatch.setattr("benchmarks.resumable.describe", lambda: machine)
    out = tmp_path / "bfloat16.json"
    found = bfloat16.measure("pictogram", 1, 1, ["nothing"], out)["cases"]
    assert 0 < found["nothing"]["relative_error"] < 0.2
    assert found["nothing"]["psnr_db"]["median"] > 20
    monkeypatch.setattr(bfloat16, "_Stage", None)
    again = bfloat16.measure("pictogram", 1, 1, ["nothing"], out)
    assert again == json.loads(out.read_text())
    assert "| nothing | 0.0" in bfloat16_table(again)


def test_a_case_that_is_none():
    with pytest.raises(
        RequestError, match=r"no case is called int4; there are nothing; the timestep"
    ):
        bfloat16.measure(only=["int4"])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("nothing", set()),
        (NORMS, {"MVN"}),
        ("all but convolutions, products and attention", {"MVN", "Add"}),
    ],
)
def test_what_a_case_keeps(name, kept):
    kinds = ("MVN", "Add", "MatMul", "Convolution", "Parameter", "Constant")
    assert {kind for kind in kinds if bfloat16.CASES[name].keeps(kind)} == kept
