"""What all commands' parsers have in common: an error is one line, and says what was meant."""

import argparse
import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from engine.errors import USER_ERROR

__all__ = ["CommandParser"]

# As argparse writes.
REST = "unrecognized arguments: "
INVALID = re.compile(
    r"^argument (\S+/)?(?P<option>[^/\s]+): invalid choice: (?P<value>.+) \(choose"
)
# What other programs call values of options.
FOREIGN_VALUES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("fp16", "f16", "half"), "float16"),
        **dict.fromkeys(("fp32", "f32", "full"), "float32"),
        **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
        **dict.fromkeys(("onnxruntime", "onnx", "ort"), "cpu"),
        **{"ov": "openvino", "trt": "tensorrt", "rtx": "tensorrt_rtx", "gpu": "cuda"},
        "jpeg": "jpg",
    }
)


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
        hint = hint or self._meant_value(message)
        self.exit(USER_ERROR, f"error: {message}{hint} (`{self.prog} --help` lists the options)\n")

    def _meant_value(self, message: str) -> str:
        """Return a hint at the option and the value that a wrong one stands for, or ""."""
        found = INVALID.search(message)
        action = found and self._option_string_actions.get(found["option"])
        if not found or not action:
            return ""
        value = found["value"].strip("'\"")
        word = value.lower().partition(":")[0]  # torch's cuda:0
        others = [each for each in self._actions if each is not action and each.option_strings]
        for each in (action, *others):
            known = {str(choice).lower(): str(choice) for choice in each.choices or ()}
            meant = known.get(word) or known.get(FOREIGN_VALUES.get(word, ""))
            if not meant and each is action:
                close = difflib.get_close_matches(word, known, n=1)
                meant = known[close[0]] if close else None
            if meant:
                return f"; did you mean {' '.join([*each.option_strings[-1:], meant])}?"
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
        close = difflib.get_close_matches(word, options, n=1) if word.startswith("--") else []
        return close[0] if close else ""
