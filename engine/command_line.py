"""What all commands' parsers have in common: an error is one line, and says what was meant."""

import argparse
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from engine.errors import USER_ERROR

__all__ = ["CommandParser"]

REST = "unrecognized arguments: "  # how argparse begins


class CommandParser(argparse.ArgumentParser):
    """A parser that says what is wrong instead of printing its usage, forty lines of it, first.

    foreign: what other programs call options, by the names of the fields that those are here
    """

    foreign: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """End the command with one line on the standard error, and status 2."""
        words = [word.partition("=")[0].rstrip(":,") for word in message.split()]
        known = self._option_string_actions
        unknown = [word for word in words if word.startswith("-") and word not in known]
        meant = " and ".join(dict.fromkeys(name for word in unknown if (name := self._meant(word))))
        hint = f"; did you mean {meant}?" if meant else ""
        if not unknown and message.startswith(REST):
            hint = "; a text of several words stands in quotes"
        self.exit(USER_ERROR, f"error: {message}{hint} (`{self.prog} --help` lists the options)\n")

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
        close = difflib.get_close_matches(word, options, n=1) if word.startswith("--") else []
        return close[0] if close else ""
