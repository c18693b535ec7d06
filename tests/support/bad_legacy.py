"""Files in torch's old format that lie about their storages, are cut short or would run code."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.support import bad_pickles
from tests.support.bad_pickles import call, dictionary, name, number, tensor, text

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
DATA = struct.pack("<4f", 1, 2, 3, 4)
VERSION = b"\x80\x02" + number(1001) + b"."
LITTLE = b"\x80\x02" + dictionary(little_endian=b"\x88", protocol_version=number(1001)) + b"."
KEYS = b"\x80\x02](" + text("0") + b"e."


def storage(view: bytes = b"N", count: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    """Push a storage with a view, or None."""
    facts = text("storage") + name(kind) + text("0") + text("cpu") + number(count) + view
    return b"(" + facts + b"tQ"


def view(start: int, count: int) -> bytes:
    """Push a view of a storage."""
    return b"(" + text("view") + number(start) + number(count) + b"t"


def state_dict(of: bytes = storage(), shape: tuple[int, ...] = (2, 2), **extra: bytes) -> bytes:
    """Make a pickle of a tensor over a storage."""
    strides = tuple([2, 1][-len(shape) :])
    return b"\x80\x02" + dictionary(weight=tensor(of, 0, shape, strides), **extra) + b"."


def legacy(
    pickled: bytes = state_dict(),
    *,
    version: bytes = VERSION,
    facts: bytes = LITTLE,
    keys: bytes = KEYS,
    data: bytes = struct.pack("<Q", 4) + DATA,
) -> bytes:
    """Lay out a file."""
    return MAGIC + version + facts + pickled + keys + data


def legacy_files(canary: Path) -> Iterator[tuple[str, bytes, str]]:
    """Put the bad pickles into good files, cut those, and let them lie."""
    for what, pickled, message in bad_pickles.running(str(canary)):
        yield f"old torch, code: {what}", legacy(pickled), message
    good = legacy()
    first = good.index(DATA)
    for at in (len(MAGIC), len(MAGIC) + 4, len(MAGIC + VERSION) + 9, first - 40):
        yield f"old torch cut at {at}", good[:at], "cannot be read at byte"
    for at in (first - 8, first - 3, first, first + 5, len(good) - 1):
        yield f"old torch cut at {at}", good[:at], "the file at|has 0 values"
    count = struct.pack("<Q", 4)
    sys_info = b"\x80\x02" + dictionary(little_endian=b"\x89") + b"."
    other = b"\x80\x02" + number(1002) + b"."
    for what, content, message in (
        ("of another version", legacy(version=other), "in the format 1002 of torch"),
        ("of no version", legacy(version=b"\x80\x02N."), "in the format None of torch"),
        ("big-endian", legacy(facts=sys_info), "was written big-endian"),
        ("without facts", legacy(facts=b"\x80\x02N."), "was written big-endian"),
        ("with a byte too many", good + b"\0", "its storages end at byte"),
        ("with a storage of 2**62", legacy(data=struct.pack("<Q", 2**62) + DATA), "4611686018"),
        ("with another storage", legacy(keys=KEYS.replace(b"0", b"1")), "not those of its tensors"),
        ("with no keys", legacy(keys=b"\x80\x02N."), "not those of its tensors"),
        ("with keys that are numbers", legacy(keys=b"\x80\x02](K\0e."), "not those of its tensors"),
        (
            "with a key twice",
            legacy(keys=KEYS[:-2] + text("0") + b"e."),
            "not those of its tensors",
        ),
        ("with a number for a dictionary", legacy(b"\x80\x02K\1."), "are not those of its tensors"),
        ("with a large storage", legacy(state_dict(storage(count=5))), "ends at byte"),
        ("with a small storage", legacy(state_dict(storage(count=3), (3,))), "has 4 values, and"),
        ("with a storage of 2**63", legacy(state_dict(storage(count=2**63))), "name or a size"),
        ("with a view of a text", legacy(state_dict(storage(text("a")))), "a view of a storage"),
        ("with a view too far", legacy(state_dict(storage(view(3, 2)))), "a view of 2 values at 3"),
        ("with a small view", legacy(state_dict(storage(view(1, 3)))), "ends at value 4 of a stor"),
        ("with a negative view", legacy(state_dict(storage(view(-1, 4)))), "a view of a storage"),
        (
            "with a storage of two types",
            legacy(state_dict(b=tensor(storage(kind="torch.DoubleStorage")))),
            "a storage '0' of two types or sizes",
        ),
        (
            "with complex numbers",
            legacy(state_dict(storage(kind="torch.ComplexFloatStorage"))),
            "holds values of torch.ComplexFloatStorage",
        ),
        (
            "with a name twice",
            legacy(b"\x80\x02}(" + (text("a") + tensor(storage())) * 2 + b"u."),
            "'a' twice in a dictionary",
        ),
        (
            "with code for a version",
            legacy(version=next(bad_pickles.running("x"))[1]),
            "names posi",
        ),
        ("with code for keys", legacy(keys=next(bad_pickles.running("x"))[1]), "names posix"),
        ("with a storage for facts", legacy(facts=b"\x80\x02" + storage() + b"."), "of its own"),
        (
            "with a size of texts",
            legacy(state_dict(b=call("torch.Size", text("a")))),
            "torch.Size that is none",
        ),
        (
            "with strides too far",
            legacy(state_dict(b=tensor(storage(), 0, (2, 2), (2**40, 1)))),
            "a storage of 4",
        ),
    ):
        yield f"old torch {what}", content, message
    nothing = legacy(b"\x80\x02}.", keys=b"\x80\x02].", data=count)
    yield "old torch with a storage of nobody", nothing, "its storages end at byte"
