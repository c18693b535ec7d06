"""From a line to a request: with what the command line says where the line does not."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine.errors import RequestError, choice
from runtime.batch.lines import Line
from runtime.images.canvas import ALPHA
from runtime.images.files import open_image
from runtime.images.upscaling import Hires, is_trained
from runtime.options import FIELDS, HIRES, hires_fields, read_pictures
from runtime.request import MASKED, OF_A_MASK, OF_AN_IMAGE, Request, idle_fields
from runtime.upscaler_folder import find_upscaler

__all__ = ["ANY_SEED", "Defaults", "digest"]

NO_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # in no file's settings
ANY_SEED = -1
PICTURES = ("image", "mask")
NOT_SHARED = ("prompt", "seed", "hires")  # by the lines of a file
STAND_IN = Image.new("RGBA", (8, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What holds for every line that does not say otherwise.

    fields: of a request; hires: of its second run, by the names of `Hires`
    seed: from which, with its number, a line without one has its own
    folder: in which lines may name pictures; upscaler_dir: in which they may name upscalers
    """

    fields: Mapping[str, Any]
    hires: Mapping[str, Any]
    seed: int
    folder: Path
    upscaler_dir: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, seed: int, folder: Path) -> "Defaults":
        """Return what a command line says, whose pictures are read. Raises RequestError."""
        own = {name: getattr(options, name) for name in FIELDS if name not in NOT_SHARED}
        given = {**own, **read_pictures(options)}
        return cls(
            fields={name: value for name, value in given.items() if value is not None},
            hires=hires_fields(options),
            seed=seed,
            folder=folder,
            upscaler_dir=options.upscaler_dir,
        )

    def check(self) -> None:
        """Raise RequestError for a value that no line could be drawn with, whatever it says."""
        for name, value in self.fields.items():
            fields: dict[str, Any] = {name: value}
            if name in OF_AN_IMAGE:
                fields = {"image": STAND_IN, **fields}
            if name in OF_A_MASK:
                fields = {"inpaint_area": MASKED, **fields, "mask": STAND_IN}
            if name == "variation_seed":
                if value == ANY_SEED or isinstance(value, tuple):
                    continue  # each line's own, or as many as its pictures
                fields["variation_strength"] = 1.0
            Request(prompt="", **fields)
        if self.hires:
            Hires(**self.hires)

    def request(self, line: Line, *, with_pictures: bool = True) -> Request:
        """Return a line's request, every picture's seed chosen.

        with_pictures: whether the files that it names are read, or only looked for
        Raises RequestError.
        """
        own = {name: value for name, value in line.fields.items() if name not in HIRES}
        for name in PICTURES:
            if own.get(name) is not None and not (name == "mask" and own[name] == ALPHA):
                path = self._picture(name, own[name])
                own[name] = open_image(path) if with_pictures else STAND_IN
        fields = {**self.fields, **own}
        needed = (fields.get(name) for name in ("image", "mask", "extend", "inpaint_area"))
        _, idle = idle_fields(*needed)
        left_out = idle.keys() - own.keys()
        fields = {name: value for name, value in fields.items() if name not in left_out}
        fields["hires"] = self._hires(line.fields)
        if fields.get("seed") in (None, ANY_SEED):
            fields["seed"] = self._drawn("seed", line)
        if fields.get("variation_strength") and fields.get("variation_seed") in (None, ANY_SEED):
            fields["variation_seed"] = self._drawn("variation_seed", line)
        try:
            request = Request(**fields)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"a field's value is of another kind ({error})") from error
        for text in (*request.prompts, *request.negative_prompts):
            if unwritable := NO_TEXT.search(text):
                raise RequestError(f"a text holds the character {unwritable[0]!a}; leave it out")
        return request

    def _hires(self, fields: Mapping[str, Any]) -> Hires | None:
        given = fields.get("hires", {})
        if given is None or not isinstance(given, dict):
            if given is None or given is False:
                return None
            raise RequestError(f'hires is {given!r}; give an object, such as {{"scale": 2}}')
        own = {HIRES[name]: value for name, value in fields.items() if name in HIRES}
        chosen = {**self.hires, **given, **own}
        if unknown := chosen.keys() - HIRES.values():
            name = sorted(unknown)[0]
            raise RequestError(f"{name} is no field of hires; {choice(name, HIRES.values())}")
        if "scale" not in chosen and not given:
            if own:
                raise RequestError(f"{', '.join(own)} of hires came without hires_scale")
            return None
        named = chosen.get("upscaler")
        if self.upscaler_dir and isinstance(named, str) and is_trained(named):
            chosen["upscaler"] = find_upscaler(named, self.upscaler_dir)
        return Hires(**chosen)

    def _picture(self, name: str, given: object) -> Path:
        """Return a picture that lies in the folder. Raises RequestError."""
        if not isinstance(given, str):
            raise RequestError(f"{name} is no text; give the name of a file")
        try:
            path, folder = (self.folder / given).resolve(), self.folder.resolve()
            found = path.is_relative_to(folder) and path.is_file()
        except (OSError, RuntimeError, ValueError):
            found = False
        if not found:
            raise RequestError(
                f"{name} is {given[:200]!r}, which is no file in {self.folder}; --image-dir names "
                "the folder of pictures"
            )
        return path

    def _drawn(self, name: str, line: Line) -> int:
        text = f"{self.seed} {line.number} {name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def digest(fields: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that tell a line's fields. Raises RequestError for no JSON."""
    try:
        text = json.dumps(fields, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a value cannot be written as JSON ({error})") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]
