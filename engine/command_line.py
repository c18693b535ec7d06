"""What all commands' parsers have in common: an error is one line, and says what was meant."""

import argparse
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from engine.errors import FOREIGN_VALUES, USER_ERROR, nearest, renamed

__all__ = ["CommandParser"]

# As argparse writes.
REST = "unrecognized arguments: "
QUOTE = "'"
INVALID = re.compile(
    r"argument (?P<name>\S+): invalid choice: (?P<value>.+) \(choose from (?P<known>.*)\)$"
)


class CommandParser(argparse.ArgumentParser):
    """A parser that says what is wrong instead of printing its usage, forty lines of it, first.

    foreign: what other programs call options, by the names of the fields that those are here
    """

    foreign: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """End the command with one line on the standard error, and status 2."""
        message = self.near_first(message)
        words = [word.partition("=")[0].rstrip(":,") for word in message.split()]
        known = self._option_string_actions
        unknown = [word for word in words if word.startswith("-") and word not in known]
        meant = " and ".join(dict.fromkeys(name for word in unknown if (name := self._meant(word))))
        hint = f"; did you mean {meant}?" if meant else ""
        if not unknown and message.startswith(REST):
            hint = "; a text of several words stands in quotes"
        self.exit(USER_ERROR, f"error: {message}{hint} (`{self.prog} --help` lists the options)\n")

    def in_options(self, sentence: str) -> str:
        """Return a sentence that speaks of fields with the options that those are here."""
        names: dict[str, str] = {}
        for action in self._actions:
            long = [option for option in action.option_strings if option.startswith("--")]
            for option in long:
                names.setdefault(option[2:].replace("-", "_"), option)
            if long:  # hires.scale is the option of hires_scale
                names |= dict.fromkeys((action.dest, action.dest.replace("_", ".", 1)), long[0])
        return renamed(sentence, names)

    def near_first(self, message: str) -> str:
        """Return what argparse says of a wrong choice with the near one before the list."""
        found = INVALID.search(message)
        if not found:
            return message
        named = (each for each in self._actions if found["name"] in _names_of(each))
        action, value = next(named, None), found["value"]
        meant = self._meant_value(action, value.strip("'\"")) if action else ""
        said = f"did you mean {meant}? There are" if meant else "choose one of"
        return f"{message[: found.end('value')]}; {said} {found['known'].replace(QUOTE, '')}"

    def _meant_value(self, action: argparse.Action, value: str) -> str:
        """Return the option and the value that a wrong one stands for, or ""."""
        word = value.lower().partition(":")[0]  # torch's cuda:0
        others = [each for each in self._actions if each is not action and each.option_strings]
        for each in (action, *others):
            known = {str(choice).lower(): str(choice) for choice in each.choices or ()}
            meant = known.get(word) or known.get(FOREIGN_VALUES.get(word, ""))
            if not meant and each is action:
                meant = nearest(word, known.values())
            if meant:
                return " ".join([*each.option_strings[-1:], meant])
        return ""

    def _meant(self, word: str) -> str:
        """Return the options that a word stands for, which is none; "" where none is near."""
        name = word.lstrip("-").replace("-", "_")
        fields = self.foreign.get(name, name).split(" and ")
        found = [action for field in fields for action in self._actions if action.dest == field]
        if found:
            return " and ".join(
                (action.option_strings or [f"{action.metavar} without an option"])[-1]
                for action in found
            )
        options = [option for option in self._option_string_actions if option.startswith("--")]
        return nearest(word, options) if word.startswith("--") else ""


def _names_of(action: argparse.Action) -> set[str]:
    """Return what argparse's errors may call an option."""
    named = {"/".join(action.option_strings), action.dest}
    return named | ({action.metavar} if isinstance(action.metavar, str) else set())
