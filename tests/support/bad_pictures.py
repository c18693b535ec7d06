"""Pictures with a damaged textual inversion in them, with one in their pixels, or with none."""

import base64
import json
import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"sd-ti-embedding"
EMBEDDING = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": {"TORCHTENSOR": [[0.5, -1.0, 2.0], [1e-3, 3, 4]]}},
    "name": "mystyle",
    "step": 499,
}


def chunk(kind: bytes, content: bytes) -> bytes:
    """Lay out a chunk of a PNG."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def picture(*chunks: bytes) -> bytes:
    """Lay out a PNG of one black pixel, with more chunks before its data."""
    head = chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return PNG + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def carrying(value: object, kind: bytes = b"tEXt") -> bytes:
    """Put a value of JSON, or a text or bytes in its place, into a picture."""
    if not isinstance(value, (bytes, str)):
        value = json.dumps(value)
    encoded = value if isinstance(value, bytes) else base64.b64encode(value.encode())
    return picture(chunk(kind, KEYWORD + b"\0" + encoded))


def pictures() -> Iterator[tuple[str, bytes, str]]:
    """Go through bad pictures."""
    pixels = "hidden in the pixels is not read"
    yield "a picture", picture(), pixels
    yield "a picture with words", picture(chunk(b"tEXt", b"parameters\0a cat")), pixels
    yield "a photograph", b"\xff\xd8\xff\xe0\0\x10JFIF", pixels
    yield "a picture in WebP", b"RIFF\0\0\0\0WEBPVP8L", pixels
    yield "a picture in JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n", pixels
    good = carrying(EMBEDDING)
    begin = good.index(b"tEXt")
    for at in (9, 20, begin - 2, begin + 2, begin + 30, begin + 100):
        yield f"a picture cut at {at}", good[:at], "cut off in a chunk|its chunk at byte"
    large = good[: begin - 4] + b"\xff\xff\xff\xff" + good[begin:]
    yield "a chunk of 4 GB", large, "has 4294967295 bytes"
    for what, value, message in (
        ("no base64", b"!!", "is no JSON in base64"),
        ("no UTF-8", base64.b64encode(b"\xff"), "is no JSON in base64"),
        ("no JSON", "{", "is no JSON in base64"),
        ("nothing", b"", "is no JSON in base64"),
        ("a list", [], "is a list, not an object"),
        ("a tensor alone", {"TORCHTENSOR": [1.0]}, "is a StoredTensor, not an object"),
        ("a deep list", "[" * 100_000, "is no JSON in base64"),
        ("a name twice", '{"a": 1, "a": 2}', "'a' is there twice"),
        ("half a character", '{"\\ud800": 1}', "is no valid Unicode"),
        ("a tensor of texts", {"a": {"TORCHTENSOR": ["x"]}}, "no vector or matrix of numbers"),
        ("a tensor of truth", {"a": {"TORCHTENSOR": [True]}}, "no vector or matrix of numbers"),
        ("a tensor of nothing", {"a": {"TORCHTENSOR": None}}, "no vector or matrix of numbers"),
        ("an empty tensor", {"a": {"TORCHTENSOR": []}}, "no vector or matrix of numbers"),
        ("empty rows", {"a": {"TORCHTENSOR": [[], []]}}, "no vector or matrix of numbers"),
        ("ragged rows", {"a": {"TORCHTENSOR": [[1], [1, 2]]}}, "no vector or matrix of numbers"),
        ("a cube", {"a": {"TORCHTENSOR": [[[1.0]]]}}, "no vector or matrix of numbers"),
        ("a huge number", {"a": {"TORCHTENSOR": [10**400]}}, "is no JSON in base64"),
        ("a number of many digits", '{"a": ' + "9" * 5000 + "}", "is no JSON in base64"),
        ("5 MB", b"A" * 5_000_000, "has 5000000 bytes, and"),
    ):
        yield f"an embedding that is {what}", carrying(value), message
    compressed = chunk(b"iTXt", KEYWORD + b"\0\1\0\0\0" + zlib.compress(b"x"))
    yield "a compressed embedding", picture(compressed), "its embedding is compressed"
