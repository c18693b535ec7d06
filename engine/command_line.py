"""What all commands' parsers have in common: an error is one line, and says what was meant."""

import argparse
import difflib
from typing import NoReturn

from engine.errors import USER_ERROR

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser that says what is wrong instead of printing its usage, forty lines of it, first."""

    def error(self, message: str) -> NoReturn:
        """End the command with one line on the standard error, and status 2."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        close = [
            difflib.get_close_matches(name, known, n=1) for name in unknown if name not in known
        ]
        meant = " and ".join(names[0] for names in close if names)
        hint = f"; did you mean {meant}?" if meant else ""
        self.exit(USER_ERROR, f"error: {message}{hint} (`{self.prog} --help` lists the options)\n")
