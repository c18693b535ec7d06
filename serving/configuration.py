"""The options of a command from a file and from the environment, by the names that they have there.

What stands on the command line is taken before a variable, and that before the file. Every value
is read as the command line reads it.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.command_line import CommandParser
from engine.errors import RequestError, nearest

PREFIX = "LATENTRT_SERVE_"
CONFIG = "config"
SEPARATOR = ";"  # of several values in one variable
FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def parse_options(
    parser: CommandParser,
    arguments: Sequence[str] | None,
    environment: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Return the options of a command line, a file and an environment, in that order.

    parser: with an option --config, which names a file of TOML; it is not to be used again
    settings: what a file would say, where another program has read it
    Raises RequestError for what a file or a variable says wrongly.
    """
    parser.parse_args(arguments)  # what it prints, such as its help, has the defaults
    defaults = parser.parse_args([])
    actions = {_name(action): action for action in parser._actions if _name(action) != "help"}
    for action in actions.values():
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(arguments))
    variables = _from_environment(parser, actions, environment)
    path = given.get(CONFIG) or variables.pop(CONFIG, None)
    file = _parsed_settings(parser, actions, settings or {}, "args")
    if path is not None:
        file |= _from_file(parser, actions, path)
    return argparse.Namespace(**{**vars(defaults), **file, **variables, **given})


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1].removeprefix("--")


def _from_environment(
    parser: CommandParser,
    actions: Mapping[str, argparse.Action],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower().replace("_", "-")
        action = _action(actions, name, f"the variable {variable}")
        value: Any = text
        if action.nargs == 0:
            value = FLAGS.get(text.lower(), text)
        elif _takes_many(action):
            value = text.split(SEPARATOR)
        found |= _parsed(parser, action, value, f"the variable {variable}")
    return found


def _from_file(
    parser: CommandParser, actions: Mapping[str, argparse.Action], path: Path
) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or f"it is no TOML: {error}"
        raise RequestError(f"--config {path} cannot be read ({why})") from error
    return _parsed_settings(parser, actions, settings, str(path))


def _parsed_settings(
    parser: CommandParser,
    actions: Mapping[str, argparse.Action],
    settings: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        action = _action(actions, name, f"{name} in {where}")
        if name == CONFIG:
            raise RequestError(f"{where} names another file of settings; put all into one")
        found |= _parsed(parser, action, value, f"{name} in {where}")
    return found


def _action(actions: Mapping[str, argparse.Action], name: str, where: str) -> argparse.Action:
    if name not in actions:
        near = nearest(name, actions)
        meant = f"; did you mean {near}?" if near else "; `--help` lists them"
        raise RequestError(f"{where} is no option of this command{meant}")
    return actions[name]


def _takes_many(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _parsed(
    parser: CommandParser, action: argparse.Action, value: Any, where: str
) -> dict[str, Any]:
    """Read a value as the command line would; returns it by its name in the namespace."""
    option = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise RequestError(f"{where} is {value!r}; give true or false")
        return {action.dest: value}
    values = value if isinstance(value, list) and _takes_many(action) else [value]
    if not values or not all(type(each) in (str, int, float) for each in values):
        kind = "a text, or a list of some" if _takes_many(action) else "a text or a number"
        raise RequestError(f"{where} is {value!r}; give {kind}")
    parser.exit_on_error = False
    try:
        return vars(parser.parse_args([f"{option}={each}" for each in values]))
    except argparse.ArgumentError as error:
        said = parser.near_first(str(error)).partition(": ")[2]
        raise RequestError(f"{where}: {said}") from None
