"""Errors of usage: one line, which names what was meant."""

import pytest

from engine.command_line import CommandParser
from latentrt.__main__ import main


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: ")
    return told.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("a", "--stepz", "3"), "did you mean --steps?"),
        (("a", "--seeed=3"), "did you mean --seed?"),
        (("a", "--stepz", "3", "--widht", "8"), "did you mean --steps and --width?"),
        (("a", "--xyzzy"), "unrecognized arguments: --xyzzy (`latentrt --help`"),
        (("a", "--steps", "x"), "argument --steps: invalid int value: 'x'"),
        (("--steps", "3"), "give a PROMPT, or --again with a picture"),
        (("serve", "--prot", "3"), "did you mean --port? (`latentrt serve --help`"),
        (("info",), "the following arguments are required: FILE"),
        (("export", "info"), "the following arguments are required: FILE"),
        (("calibrate",), "arguments are required"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, wanted):
    message = said(capsys, *arguments)
    assert wanted in message
    assert "None" not in message


def test_a_parser_without_options(capsys):
    with pytest.raises(SystemExit):
        CommandParser(prog="x").parse_args(["--nothing"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --nothing (`x --help` lists the options)\n"
    )
