import pytest

from engine.config import AutoencoderConfig
from engine.graphs import SHIPPED, Graph, graph_name
from engine.models import find_model
from export.__main__ import main


def test_exporting_writes_a_graph_that_the_runtime_finds(tmp_path, capsys):
    out = tmp_path / "graphs"
    assert main(["pictogram", "--out", str(out), "--parts", "text_encoder"]) == 0
    (path,) = out.iterdir()
    assert Graph.read(path).part == "text_encoder"
    assert (SHIPPED / path.name).is_file()
    assert "relative error" in capsys.readouterr().out


def test_the_graphs_that_ship_are_those_of_the_model_that_ships():
    vae = AutoencoderConfig.load(find_model("pictogram") / "vae")
    assert {path.name for path in SHIPPED.glob("vae*.onnx")} == {
        graph_name("vae_decoder", vae, "float32"),
        graph_name("vae_encoder", vae, "float32"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "'no-such-model' is neither a folder nor one that ships"),
        (["pictogram", "--out", "{file}/graphs"], "cannot be made"),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(arguments, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert main([argument.format(file=file) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
