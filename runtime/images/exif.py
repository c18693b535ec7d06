"""Texts in a picture's EXIF, where JPEG and WebP keep what a PNG has in its text chunks.

Automatic1111 and the galleries of pictures have their parameters in UserComment, as UTF-16 with the
high byte first; ours, as JSON, is in MakerNote. Fooocus has both tags in the first directory, and
ComfyUI's WebP has "prompt:{...}" and "workflow:{...}" in the camera's maker and model.
"""

import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from PIL import Image

__all__ = ["exif_bytes", "texts_of"]

EXIF_DIRECTORY, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286
MAKE, MODEL, EXIF_VERSION = 0x010F, 0x0110, 0x9000
LONG, UNDEFINED_TYPE = 4, 7
OURS = b"latentrt\0"  # before the JSON, as cameras' notes begin with their makers
UNICODE, ASCII, UNDEFINED = b"UNICODE\0", b"ASCII\0\0\0", bytes(8)
JIS = b"JIS\0\0\0\0\0"
MOST = 65_000  # bytes, of what a JPEG's segment holds


def exif_bytes(parameters: str, settings: str) -> bytes:
    """Return EXIF with Automatic1111's parameters and our settings, either of them empty for none.

    What a JPEG could not hold is left out: first the parameters, then the settings.
    """
    comment = UNICODE + parameters.encode("utf-16-be", "surrogatepass") if parameters else b""
    note = OURS + settings.encode("utf-8", "surrogatepass") if settings else b""
    for kept in ({MAKER_NOTE: note, USER_COMMENT: comment}, {MAKER_NOTE: note}):
        tags = {tag: value for tag, value in kept.items() if value}
        if tags and sum(map(len, tags.values())) <= MOST:
            return _directories({EXIF_VERSION: b"0232", **tags})
    return b""


def _directories(tags: Mapping[int, bytes]) -> bytes:
    """Write EXIF's directory, tags of undefined type in rising order, below an empty first one.

    Pillow would write them as numbers of 8 bits.
    """
    first = struct.pack(">2sHI H HHII I", b"MM", 42, 8, 1, EXIF_DIRECTORY, LONG, 1, 26, 0)
    at = len(first) + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, value in tags.items():
        small = len(value) <= 4
        place = value.ljust(4, b"\0") if small else struct.pack(">I", at + len(values))
        entries += struct.pack(">HHI", tag, UNDEFINED_TYPE, len(value)) + place
        values += b"" if small else value + b"\0" * (len(value) % 2)
    return b"Exif\0\0" + first + struct.pack(">H", len(tags)) + entries + bytes(4) + values


def texts_of(image: Image.Image) -> dict[str, str]:
    """Return the texts of a picture's file by the names that PNG's chunks have for them.

    A PNG's own come as they are. "latentrt" are our settings, "parameters" Automatic1111's.
    """
    texts = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    comment = image.info.get("comment")  # of a JPEG, where stable-diffusion.cpp writes
    if isinstance(comment, bytes):
        texts.setdefault("parameters", comment.decode("utf-8", "replace"))
    with suppress(Exception):  # Pillow raises many kinds for broken EXIF
        texts |= _exif_texts(image.getexif())
    return texts


def _exif_texts(exif: Image.Exif) -> dict[str, str]:
    tags: Mapping[int, Any] = {**exif, **exif.get_ifd(EXIF_DIRECTORY)}
    texts = {}
    if comment := _decoded(tags.get(USER_COMMENT)):
        texts["parameters"] = comment
    note = tags.get(MAKER_NOTE)
    if isinstance(note, bytes) and note.startswith(OURS):
        texts["latentrt"] = note.removeprefix(OURS).decode("utf-8", "replace")
    elif scheme := _decoded(note):
        texts["fooocus_scheme"] = scheme
    for tag in (MAKE, MODEL):
        name, found, text = str(tags.get(tag, "")).partition(":")
        if found and name in ("prompt", "workflow"):
            texts[name] = text.rstrip("\0")
    return texts


def _decoded(value: object) -> str:
    """Decode a comment of EXIF: eight bytes name its characters, or it is text already."""
    if isinstance(value, str):
        return value.strip("\0 ")
    if not isinstance(value, bytes):
        return ""
    kind, text = value[:8], value[8:]
    if kind == UNICODE:
        # Programs disagree about the order of bytes: of Latin letters every other one is 0.
        order = "utf-16-be" if text[::2].count(0) >= text[1::2].count(0) else "utf-16-le"
        return text.decode(order, "replace").strip("\0\ufeff ")
    if kind == JIS:
        return text.decode("shift_jis", "replace").strip("\0 ")
    return (text if kind in (ASCII, UNDEFINED) else value).decode("utf-8", "replace").strip("\0 ")
