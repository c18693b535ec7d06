import json
import sys

import onnx
import pytest

from benchmarks import build, memory, resumable, scale, worker
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, EMULATED, REFERENCE
from benchmarks.machine import memory as own_memory
from benchmarks.resource_tables import build_table, memory_table, scale_table
from benchmarks.scenarios import WHOLE
from benchmarks.worker import ContenderError, once
from engine.backends.settings import ON_GPU, PRECISIONS
from engine.errors import BackendError, OutputError, RequestError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from export.tracing import TracedPart

POINT = {"batch": 2, "size": 64, "steps": 1, "threads": 1}
CPP = "stable-diffusion.cpp float32"


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    described = {"processor": "P", "cores": 1, "peak_gflops": 1.0}
    monkeypatch.setattr(resumable, "describe", lambda: dict(described))


class FakeWorker:
    """A contender whose memory grows by a mebibyte a stage."""

    def __init__(self, contender, scenario, threads):
        self.whole_only, self.now = CONTENDERS[contender].whole_only, 2

    def told(self):
        self.now += 1
        return {"resident_bytes": self.now * 2**20, "peak_bytes": (self.now + 1) * 2**20}

    def ready(self, bound_s):
        parts = [WHOLE] if self.whole_only else ["text", "step", "decode", WHOLE]
        return {"parts": parts, "imported": self.told(), "opened": self.told()}

    def run(self, part, bound_s):
        if part == WHOLE:
            assert self.whole_only
        return {"seconds": 1.0, "memory": self.told()}

    def close(self):
        pass


def test_the_memory_of_a_request_by_stage(tmp_path, capsys):
    out = tmp_path / "memory.json"
    options = ["--only", REFERENCE, "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert main(["memory", *options]) == 0
    measured = json.loads(out.read_text())
    assert measured == json.loads(capsys.readouterr().out)
    (stages,) = measured["contenders"][REFERENCE]["rounds"]
    assert tuple(stages) == memory.STAGES
    peaks = [stage["peak_bytes"] for stage in stages.values()]
    assert peaks == sorted(peaks)
    assert stages["open step"]["peak_bytes"] > stages["text"]["peak_bytes"] + 2**24
    assert measured["weights"]["numbers"] * 4 == pytest.approx(47.6e6, rel=0.01)
    assert f"| {REFERENCE} | " in memory_table(measured)


def test_contenders_that_show_fewer_stages(monkeypatch):
    monkeypatch.setattr(memory, "Worker", FakeWorker)
    monkeypatch.setattr(memory, "_weights", lambda scenario: {"numbers": 2**20, "file_bytes": 1})
    measured = memory.measure("sd15", 2, 1, ("eager float32", CPP))
    eager = measured["contenders"]["diffusers, eager float32"]["rounds"]
    assert [list(stages) for stages in eager] == [["import", "load", "text", "step", "decode"]] * 2
    assert list(measured["contenders"][CPP]["rounds"][0]) == ["import", "load", WHOLE]
    table = memory_table(measured)
    assert "| 4 MiB | 5 MiB | – | 6 MiB | – | 7 MiB | – | 8 MiB | 7 MiB | **8 MiB** | 2.00" in table
    with pytest.raises(RequestError, match="no contender is called"):
        memory.measure("sd15", only=("TensorFlow",))


def test_every_precision_of_every_backend_of_the_processor_is_measured():
    for backend, offered in PRECISIONS.items():
        for precision in offered if backend not in ON_GPU else ():
            measured = any(
                name.startswith("latentrt") and contender.precision == precision
                for name, contender in CONTENDERS.items()
            )
            assert measured != ((backend, precision) in EMULATED)
            assert measured == (f"open sd15 {backend} {precision}" in build.tasks())


def test_a_part_is_traced_and_engines_are_opened(monkeypatch):
    asked = []

    def trace(part, config, precision):  # the real one takes ten seconds, and has tests
        asked.append((part, config, precision))
        return TracedPart(part=part, config=config, precision=precision, model=graph)

    model = Model.open(find_model("pictogram"))
    found = find_graph("step", model.unet, "float32", graph_folders(), model.path)
    graph = onnx.load_model_from_string(found.data())
    monkeypatch.setattr("export.tracing.trace", trace)
    traced = build.traced("pictogram", "step", "float32", 1)
    assert asked == [("step", model.unet, "float32")]
    assert 0 < traced["compressed_bytes"] < traced["bytes"] == len(graph.SerializeToString())
    assert traced["nodes"] == len(graph.graph.node)
    opened = build.opened("pictogram", "cpu", "float32", 1)
    parts = sum(opened[f"{part}_s"] for part in ("load", "text", "step", "decode"))
    assert opened["seconds"] == pytest.approx(parts, abs=0.01)


def test_what_is_built_is_measured_in_turn_and_goes_on(tmp_path, monkeypatch):
    calls = []

    def fake(module, function, *arguments, threads, bound_s):
        calls.append(arguments[:-1])
        if "vae_encoder" in arguments:
            raise ContenderError("it took longer than its bound of 900 s")
        keys = ("imports_s", "seconds", "peak_bytes", "bytes", "compressed_bytes", "nodes")
        opened = ("seconds", "load_s", "text_s", "step_s", "decode_s", "peak_bytes")
        return dict.fromkeys(keys if function == "traced" else opened, 2048.0)

    monkeypatch.setattr(build, "once", fake)
    only, out = ("trace pictogram vae", "open pictogram cpu"), tmp_path / "build.json"
    build.measure(1, 1, only, out)
    names = list(json.loads(out.read_text())["tasks"])
    assert len(calls) == len(names) == 5
    calls.clear()
    measured = build.measure(2, 1, only, out)
    assert len(calls) == 5, "a second round of three, and what was late is tried again"
    assert measured["tasks"]["open pictogram cpu float32"]["figures"]["seconds"]["median"] == 2048
    table = build_table(measured)
    assert "| pictogram vae_decoder float32 | 2048.00 s, 2048.00 s to 2048.00 s | 0 MiB |" in table
    assert "| pictogram cpu float32 | 2048.00 s, 2048.00 s to 2048.00 s | 2048.00 s |" in table
    assert "- not measured: trace pictogram vae_encoder float32 (it took longer" in table
    with pytest.raises(RequestError, match="no task is called TensorFlow; there are"):
        build.measure(only=("TensorFlow",))
    with pytest.raises(OutputError, match="another request or machine"):
        build.measure(threads=2, only=only, out=out)


def test_the_points_of_a_scale():
    scenarios = scale.Scenario.of("pictogram"), scale.Scenario.of("sd15")
    shipped, large = (scale.chosen_points(scenario, 2) for scenario in scenarios)
    assert len(shipped) == 3 + 4 + 4 + 2 - 3, "the base is on four axes"
    assert len(large) == 3 + 4 + 2 - 2, "a step has no steps"
    assert "batch 4, size 128, steps 20, threads 2" in shipped
    assert {point.steps for point in large.values()} == {1}
    with pytest.raises(RequestError, match="choose pictogram, sd15"):
        scale.measure("sd3")
    with pytest.raises(BackendError, match="does not compute in bfloat16"):
        scale.measure("pictogram", "cpu", "bfloat16")


def test_a_point_is_drawn(monkeypatch):
    monkeypatch.setattr(worker, "SHORT_S", 0.0)
    request = scale.drawn("pictogram", "cpu", "float32", POINT)
    assert 0 < request["seconds"] < request["peak_bytes"]
    monkeypatch.setattr("benchmarks.scenarios.Scenario.is_made", lambda self: True)
    monkeypatch.setattr("benchmarks.scenarios.Scenario.model", lambda self: shipped)
    shipped = find_model("pictogram")
    step = scale.drawn("pictogram", "cpu", "float32", POINT)
    assert step["seconds"] < request["seconds"], "a step alone"


def test_scaling_is_measured_and_shown(tmp_path, monkeypatch):
    def fake(module, function, model, backend, precision, point, threads, bound_s):
        if point["size"] == 256:
            raise ContenderError("no memory")
        return {"seconds": float(point["batch"]), "peak_bytes": 2**30}

    monkeypatch.setattr(scale, "once", fake)
    out = tmp_path / "scale.json"
    assert main(["scale", "--repeats", "2", "--threads", "2", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert list(scale.along(measured, "batch")) == [1, 2, 4]
    assert list(scale.along(measured, "size")) == [64, 128, 192]
    table = scale_table(measured)
    assert "| pictures at once | 4 | 4.00 s, 4.00 s to 4.00 s | 1.00 s | 1.00 GiB |" in table
    assert "- not measured: batch 1, size 256, steps 20, threads 2 (no memory)" in table


def test_a_process_of_its_own_gives_what_a_function_returns():
    told = once("benchmarks.machine", "memory", threads=1, bound_s=60)
    assert set(told) == set(own_memory())
    with pytest.raises(ContenderError, match="RequestError: the model 'sd3' is not known"):
        once("benchmarks.scale", "drawn", "sd3", "cpu", "float32", POINT, threads=1, bound_s=60)
    with pytest.raises(ContenderError, match="longer than its bound of 0 s"):
        once("benchmarks.machine", "memory", threads=1, bound_s=0.01)
    with pytest.raises(ContenderError, match="the process ended"):
        once("os", "_exit", 3, threads=1, bound_s=60)


def test_a_file_that_is_no_report_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "report.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        assert main(["memory", "--only", REFERENCE, "--out", str(path)]) == 2
        assert "is no benchmark's report" in (error := capsys.readouterr().err)
        assert error.count("\n") == 1


def test_memory_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr("benchmarks.machine._status", lambda name: None)
    told = own_memory()
    assert told["resident_bytes"] == told["peak_bytes"] > 2**20
    assert sys.modules["resource"]
