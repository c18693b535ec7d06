"""What TensorRT-RTX's builder says of a small graph, which is really built."""

import json

import pytest

from benchmarks import layers
from benchmarks.layers import FORMS, main

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra tensorrt-rtx")


def test_the_builder_fuses_attention_however_it_is_written(tmp_path, capsys):
    """So TensorRT's graphs keep ONNX's Attention."""
    out = tmp_path / "layers.json"
    assert main(["--part", "step_shallow", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    forms = json.loads(out.read_text())["forms"]
    assert set(forms) == set(FORMS)
    counts = [{**each, "built_s": 0, "most frequent": {}} for each in forms.values()]
    for each in counts:
        assert each["kernels"] > each["attention"] == counts[0]["attention"] > 0
        assert each["products"] > 0
        assert each["group norms"] == counts[0]["group norms"] > 0


def test_what_is_no_work_for_the_gpu_is_not_counted():
    plan = b"""
  tensor={ name="a" }
  function={ name=__myl_Silu_0x12 fqn=__myl_Silu_0x12_vec }
  function={ name=_gemm_mha_v2_0x34 fqn=_gemm_mha_v2_0x34 }
  fully_connected={ name="node_MatMul_1" output={ "b" } }
  assert={ a }
"""
    found = layers.layers(plan)
    assert (found["entries"], found["kernels"], found["products"]) == (3, 2, 1)
    assert found["attention"] == 1
    assert found["most frequent"] == {"__myl_Silu": 1, "_gemm_mha_v2": 1}


def test_a_form_that_the_library_refuses_is_said(monkeypatch):
    monkeypatch.setattr(layers, "FORMS", {"broken": lambda data: data[: len(data) // 2]})
    found = layers.measure("pictogram", "step_shallow", "sm89", ("broken",))
    assert "step_shallow" in found["forms"]["broken"]["refused"]
