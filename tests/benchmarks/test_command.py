import json
from dataclasses import replace

import pytest

from benchmarks import batch, load, overhead, prompt, report
from benchmarks.__main__ import _MEASURES, main
from engine.adapters.adapter import read_adapter
from engine.errors import OutputError
from engine.model import Model


def test_the_prompt_benchmark_measures_and_writes_json(tmp_path, capsys, monkeypatch):
    assert prompt.STEPS == 20
    monkeypatch.setattr(prompt, "STEPS", 2)
    out = tmp_path / "prompt.json"
    assert main(["prompt", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["request"]["steps"] == 2
    for name, summary in report.items():
        if name not in ("machine", "request"):
            assert 0 < summary["min"] <= summary["median"] <= summary["max"]


def test_the_overhead_benchmark_measures_every_sampler(capsys, monkeypatch):
    pytest.importorskip("onnx")
    assert overhead.STEPS == 20
    monkeypatch.setattr(overhead, "STEPS", 4)
    assert main(["overhead", "--repeats", "1"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["request"]["steps"] == 4
    assert set(report.ROWS["overhead"]) == measured.keys() - {"machine", "request"}
    assert all(measured[name]["min"] > 0 for name in report.ROWS["overhead"])
    flops = measured["request"]["step_floor_s"] * measured["machine"]["peak_gflops"]
    assert flops == pytest.approx(1565.7, rel=0.001), "a guided step at 512 x 512, in GFLOP"


def test_no_repeats_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prompt", "--repeats", "0"])
    assert "give 1 or more" in capsys.readouterr().err


def test_an_unwritable_report_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(_MEASURES, "prompt", lambda repeats: {"repeats": repeats})
    assert main(["prompt", "--out", str(tmp_path / "missing" / "prompt.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_tables_are_those_of_the_committed_figures():
    for page, text in report.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run `python -m benchmarks report`"


def test_every_benchmark_with_figures_has_a_page():
    placed = [name for names in report.PAGES.values() for name in names]
    assert sorted(placed) == sorted(report.TABLES)
    cards = [file.name for file in report.RESULTS.glob("gpu-*.json")]
    page = next(page for page in report.PAGES if page.name == "gpu.md").read_text(encoding="utf-8")
    assert [name for name in cards if name not in page] == [], "each card's figures are told there"
    assert {file.stem for file in report.RESULTS.glob("*.json") if file.name not in cards} <= {
        *placed
    }


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(OutputError, match="put them back"):
        report.inserted("# Latentrt", "prompt", "README.md")


def test_the_files_of_the_load_benchmark_are_a_model_and_its_adapter(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    small = replace(load.SD1, block_out_channels=(32, 32, 32, 32), cross_attention_dim=64)
    text = replace(load.CLIP_L, hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    monkeypatch.setattr(load, "SD1", small)
    monkeypatch.setattr(load, "CLIP_L", text)
    model = Model.open(load.write_checkpoint(tmp_path))
    assert model.unet.block_out_channels == (32, 32, 32, 32)
    shapes = {name: model.find(name).shapes for name in ("unet", "text_encoder")}
    changed = read_adapter(load.write_lora(tmp_path)).resolve(shapes).updates
    assert len(changed) == 16 * (4 + 4 + 2 + 2) + 6, "attentions, feed-forward, projections; text"


def test_the_batch_benchmark_draws_the_same_both_ways(monkeypatch):
    folders = []
    monkeypatch.setattr(batch, "STEPS", (1, 2))
    monkeypatch.setattr(batch, "write_image", lambda image, *_: folders.append(image.size))
    measured = batch.measure(1, requests=3)
    assert folders == [(128, 128)] * 6, "with a turn to warm up"
    assert measured["request"]["requests"] == 3
    for clock in ("second", "processor_second"):
        loop, together, ratio = (
            measured[name.format(clock)]["median"]
            for name in ("loop_pictures_a_{}", "batch_pictures_a_{}", "batch_beside_loop_by_{}s")
        )
        assert ratio == pytest.approx(together / loop, rel=1e-3)
