"""Settings that other programs left in a picture, as fields of a request where they map.

    Automatic1111, Forge, stable-diffusion.cpp, Civitai    runtime/images/a1111_reader.py
    ComfyUI                                                runtime/images/comfyui.py
    InvokeAI, Fooocus                                      runtime/images/json_settings.py

What does not map is in `left_out`, by the name that the program has for it, so that it can be told.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from runtime.images.a1111 import OURS, PARAMETERS_KEY
from runtime.images.a1111_reader import parse_parameters
from runtime.images.comfyui import parse_prompt_graph
from runtime.images.json_settings import (
    parse_dream,
    parse_fooocus,
    parse_invokeai,
    parse_old_invokeai,
)

__all__ = ["parse_foreign"]

# By the texts of a picture, those that say more first; Fooocus writes its own where Automatic1111
# writes other text.
READERS = (
    ("invokeai_metadata", parse_invokeai),
    ("sd-metadata", parse_old_invokeai),
    ("Dream", parse_dream),
    (PARAMETERS_KEY, parse_fooocus),
    (PARAMETERS_KEY, parse_parameters),
    ("prompt", parse_prompt_graph),
)


_TEMPLATE = re.compile(r"\{.*(?:\||\$\$)|__[\w.*/-]+__", re.DOTALL)
_CHOICE = re.compile(r"\\.|([{}]|_(?=_)|(?<=_)_)", re.DOTALL)


def parse_foreign(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a picture's texts hold, as `parse_parameters` does; {} for none."""
    for name, reader in READERS:
        with suppress(ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
            if name in texts and (found := reader(texts[name])):
                return found if f"Version: {OURS}" in texts[name] else _as_text(found)
    return {}


def _as_text(settings: dict[str, Any]) -> dict[str, Any]:
    """Escape braces and wildcards: the others keep the text that they had chosen, or know none."""
    for name in ("prompt", "negative_prompt"):
        if isinstance(text := settings.get(name), str) and _TEMPLATE.search(text):
            settings[name] = _CHOICE.sub(lambda mark: f"\\{mark[1]}" if mark[1] else mark[0], text)
    return settings
