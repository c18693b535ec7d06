"""The models that ship, each a folder in diffusers' layout."""

import difflib
from contextlib import suppress
from pathlib import Path

from engine.errors import ModelError

FOLDER = Path(__file__).parent


def shipped_models() -> list[str]:
    """Return the names of the models that ship."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def find_model(model: str | Path) -> Path:
    """Return a model's folder or file, given its name or the path itself; raises ModelError."""
    path = Path(model)
    with suppress(OSError):  # a name longer than the system allows, a folder that is closed to us
        if path.is_dir() or path.is_file():
            return path
    if str(model) in shipped_models():
        return FOLDER / str(model)
    close = difflib.get_close_matches(str(model), shipped_models(), n=1)
    raise ModelError(
        f"the model {str(model)!r} is neither a folder or file nor one that ships "
        f"({', '.join(shipped_models()) or 'none'}); "
        + (f"did you mean {close[0]!r}?" if close else "give the path of a folder or file")
    )
