import pytest

from engine.configs.diffusion import AutoencoderConfig
from engine.graphs.graph import Graph, find_graph, graph_name
from engine.model import Model, find_model
from engine.shipped import GRAPHS
from export.__main__ import main
from tests.support.small_parts import TEXT
from tests.support.traced import trace_once


def test_exporting_writes_a_graph_that_the_runtime_finds(tmp_path, capsys):
    out = tmp_path / "graphs"
    assert main(["pictogram", "--out", str(out), "--parts", "text_encoder"]) == 0
    (path,) = out.iterdir()
    assert Graph.read(path).part == "text_encoder"
    assert (GRAPHS / path.name).is_file()
    assert "relative error" in capsys.readouterr().out


def test_the_graphs_that_ship_are_those_of_the_model_that_ships():
    vae = AutoencoderConfig.load(find_model("pictogram") / "vae")
    assert {path.name for path in GRAPHS.glob("vae*.onnx")} == {
        graph_name(part, vae, precision)
        for part in ("vae_decoder", "vae_encoder")
        for precision in ("float32", "float16")
    }


def test_a_model_in_pieces_is_exported_as_it_is_drawn(tmp_path, monkeypatch):
    shipped, opened = find_model("pictogram"), []
    monkeypatch.setattr("export.writing.export_part", lambda model, *_: opened.append(model))
    pieces = {name: shipped / name for name in ("unet", "text_encoder", "vae")}
    options = [f"--{name.replace('_', '-')}={path}" for name, path in pieces.items()]
    assert main([*options, "--out", str(tmp_path), "--parts", "step"]) == 0
    assert main(["pictogram", options[0], "--out", str(tmp_path), "--parts", "step"]) == 0
    alone, replaced = opened
    assert alone.path == pieces["unet"]
    assert replaced.path == shipped
    for model in opened:
        assert model.given["unet"] == pieces["unet"]
        assert model.configs["unet"] == Model.open(shipped).configs["unet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "'no-such-model' is neither a folder or file nor one that ships"),
        (["pictogram", "--out", "{file}/graphs"], "graphs cannot be written"),
        ([], "give a MODEL, or --unet FILE"),
        (["--vae", "{file}"], "give a MODEL, or --unet FILE"),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(arguments, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert main([argument.format(file=file) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_published_graphs_are_written_compressed_and_the_same_each_time(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("export.published.published_parts", lambda: [("text_encoder", TEXT)])
    monkeypatch.setattr("export.writing.trace", trace_once)
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert main(["graphs", "--out", str(folder)]) == 0
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1], "no time of making in them"
    assert set(written[0]) == {
        f"{graph_name('text_encoder', TEXT, precision)}.gz" for precision in ("float32", "float16")
    }
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("kB" in line and "nodes" in line for line in lines)
    assert main(["graphs", "--out", str(tmp_path / "none"), "--parts", "step", "vae_decoder"]) == 0
    assert not list((tmp_path / "none").iterdir())
    for precision in ("float32", "float16"):
        graph = find_graph("text_encoder", TEXT, precision, [tmp_path / "first"], tmp_path)
        assert dict(graph.weights) == TEXT.tensor_shapes()


def test_help_of_every_command(capsys):
    for arguments in (
        ["--help"],
        ["info", "--help"],
        ["graphs", "--help"],
        ["language-model", "--help"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert "python -m export" in capsys.readouterr().out


def test_interrupted(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("export.writing.trace", interrupt)
    assert main(["graphs", "--out", str(tmp_path)]) == 130
    assert "cancelled" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
