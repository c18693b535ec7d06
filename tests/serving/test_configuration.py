"""Options of the server from a file, from the environment and from the command line."""

from pathlib import Path

import pytest

from engine.errors import RequestError
from serving.__main__ import main
from serving.configuration import PREFIX, parse_options
from serving.options import engine_settings, make_parser

WHOLE = """
model = ["a=pictogram", "b=pictogram"]
port = 8080
rows = 4
max-queue-seconds = 30
open = true
precision = "float32"
lora-dir = "loras"
"""


def options(arguments=(), file=None, tmp_path=None, **variables):
    arguments = list(arguments)
    if file is not None:
        path = tmp_path / "server.toml"
        path.write_text(file)
        arguments += ["--config", str(path)]
    named = {f"{PREFIX}{name}": value for name, value in variables.items()}
    return parse_options(make_parser("serve"), arguments, {"HOME": "/", **named})


def test_every_option_may_stand_in_a_file(tmp_path):
    read = options(file=WHOLE, tmp_path=tmp_path)
    assert (read.models, read.port) == (["a=pictogram", "b=pictogram"], 8080)
    assert (read.open, read.max_queue_seconds) == (True, 30.0)
    assert read.lora_dir == Path("loras")
    assert read.host == "127.0.0.1", "what is not named keeps its default"
    assert engine_settings(options(file="rows = 4", tmp_path=tmp_path)).rows == 4


def test_every_option_may_be_a_variable():
    read = options(MODEL="a=pictogram;b=x=y", PORT="1", OPEN="true", MAX_QUEUE_SECONDS="2.5")
    assert read.models == ["a=pictogram", "b=x=y"]
    assert (read.port, read.open, read.max_queue_seconds) == (1, True, 2.5)
    assert options(OPEN="0").open is False


def test_all_options_have_their_names_in_all_three(tmp_path):
    """Whatever option is added to the command is one of the file and of the environment, too."""
    actions = [a for a in make_parser("serve")._actions if a.dest not in ("help", "config")]
    assert len(actions) > 12
    for action in actions:
        name = action.option_strings[-1].removeprefix("--")
        text = {"--port": "5", "--threads": "2"}.get(f"--{name}", "7")
        value = next(iter(action.choices)) if action.choices else text
        words = [f"--{name}"] if action.nargs == 0 else [f"--{name}", value]
        written = "true" if action.nargs == 0 else f'"{value}"'
        variable = {name.upper().replace("-", "_"): "1" if action.nargs == 0 else value}
        wanted = vars(options(words))
        assert vars(options(**variable)) == wanted, name
        read = vars(options(file=f"{name} = {written}", tmp_path=tmp_path))
        assert {**read, "config": None} == wanted, name
        assert wanted != vars(options()), name


def test_the_command_line_goes_before_a_variable_and_that_before_the_file(tmp_path):
    file = 'port = 1\nhost = "file"\nrows = 1\nmodel = ["file=pictogram"]'
    read = options(
        ["--port", "3", "--model", "line=pictogram"],
        file,
        tmp_path,
        PORT="2",
        HOST="variable",
        MODEL="variable=pictogram",
    )
    assert (read.port, read.host, read.rows) == (3, "variable", "1")
    assert read.models == ["line=pictogram"], "in their place, not beside them"


def test_a_variable_may_name_the_file(tmp_path):
    (tmp_path / "a.toml").write_text("port = 5")
    assert options(CONFIG=str(tmp_path / "a.toml")).port == 5
    (tmp_path / "b.toml").write_text("port = 6")
    read = options(["--config", str(tmp_path / "b.toml")], CONFIG=str(tmp_path / "a.toml"))
    assert read.port == 6


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("prot = 1", "prot in .* is no option of this command; did you mean port?"),
        ("unheard-of = 1", "--help` lists them"),
        ("help = true", "is no option"),
        ("[server]\nport = 1", "server in .* is no option"),
        ('port = "x"', "port in .*: invalid int value"),
        ("port = true", "port in .* is True; give a text or a number"),
        ("port = [1, 2]", "give a text or a number"),
        ("port = {}", "give a text or a number"),
        ("port = 1979-05-27", "give a text or a number"),
        ("model = []", "give a text, or a list of some"),
        ("model = [[]]", "give a text, or a list of some"),
        ("open = 1", "open in .* is 1; give true or false"),
        ('precision = "float8"', "precision in .*: invalid choice"),
        ('config = "other.toml"', "put all into one"),
        ("port = ", "is no TOML"),
        ("port = 1\nport = 2", "is no TOML"),
        ("\x00", "is no TOML"),
    ],
)
def test_what_a_file_says_wrongly_is_one_sentence(tmp_path, file, said):
    with pytest.raises(RequestError, match=said) as raised:
        options(file=file, tmp_path=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PROT": "1"}, "the variable LATENTRT_SERVE_PROT is no option .* did you mean port?"),
        ({"PORT": "x"}, "the variable LATENTRT_SERVE_PORT: invalid int value"),
        ({"OPEN": "perhaps"}, "LATENTRT_SERVE_OPEN is 'perhaps'; give true or false"),
        ({"": "1"}, "is no option"),
        ({"CONFIG": "/no/such/file"}, "--config /no/such/file cannot be read"),
    ],
)
def test_what_a_variable_says_wrongly_is_one_sentence(variables, said):
    with pytest.raises(RequestError, match=said):
        options(**variables)


def test_the_command_says_so(tmp_path, capsys):
    for content in (b"prot = 1", b"\xff"):
        (tmp_path / "bad.toml").write_bytes(content)
        assert main(["--config", str(tmp_path / "bad.toml")]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
