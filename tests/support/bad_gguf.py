"""GGUF files put together byte by byte: good ones, and such as lie about what they hold."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

F32, Q4_0, Q8_0, TEXT, ARRAY = 0, 2, 8, 8, 9
DATA = struct.pack("<8f", *range(8))


def text(value: str | bytes) -> bytes:
    """Lay out a text."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def fact(name: str | bytes, kind: int, value: bytes) -> bytes:
    """Lay out a fact; kind: 4 for a number of 32 bits, 8 for a text, 9 for an array."""
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    """Lay out an array of a fact."""
    return struct.pack("<IQ", kind, count) + values


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a header says of a tensor; by default 8 float32 numbers at the beginning."""

    name: str | bytes = "weight"
    sizes: tuple[int, ...] = (4, 2)
    kind: int = F32
    offset: int = 0

    def encode(self) -> bytes:
        """Lay it out."""
        return (
            text(self.name)
            + struct.pack("<I", len(self.sizes))
            + b"".join(struct.pack("<Q", size) for size in self.sizes)
            + struct.pack("<IQ", self.kind, self.offset)
        )


def gguf(
    *entries: Entry,
    facts: Sequence[bytes] = (),
    data: bytes = DATA,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """Lay out a file; counts: of tensors and facts, where the header is to state others."""
    stated = counts or (len(entries), len(facts))
    head = b"GGUF" + struct.pack("<IQQ", version, *stated)
    head += b"".join(facts) + b"".join(entry.encode() for entry in entries)
    return head + bytes(-len(head) % alignment) + data


GOOD = gguf(
    Entry(),
    Entry(name="blocks", sizes=(32, 2), kind=Q8_0, offset=32),
    facts=[
        fact("general.architecture", TEXT, text("sd1")),
        fact("general.alignment", 4, struct.pack("<I", 32)),
        fact("tokens", ARRAY, array(TEXT, 2, text("a") + text("b"))),
        fact("comfy.gguf.orig_shape.blocks", ARRAY, array(5, 3, struct.pack("<3i", 8, 4, 2))),
    ],
    data=DATA + bytes(range(68)),
)


def gguf_files() -> Iterator[tuple[str, bytes, str]]:
    """Cut a good file at each boundary, and let headers lie."""
    yield from _cut()
    yield from _headers()
    yield from _facts()
    yield from _tensors()


def _cut() -> Iterator[tuple[str, bytes, str]]:
    data = GOOD.index(DATA)
    for at in (4, 7, 8, 16, 24, 40, data // 2, data - 40):
        yield f"GGUF cut at {at}", GOOD[:at], "its header (goes on to byte|states 2 tensors)"
    for at in (data, data + 5, len(GOOD) - 1):
        yield f"GGUF cut at {at}", GOOD[:at], "ends at byte"


def _headers() -> Iterator[tuple[str, bytes, str]]:
    yield "GGUF of version 1", gguf(Entry(), version=1), "is of version 1; read are little"
    yield "GGUF of version 4", gguf(Entry(), version=4), "is of version 4; read are little"
    yield "big-endian GGUF", gguf(Entry(), version=3 << 24), "is big-endian; read are little"
    for counts, expected in (
        ((2, 0), "is damaged"),
        ((2**63, 0), "states 9223372036854775808 tensors"),
        ((1, 2**40), "states 1099511627776 facts"),
        ((10**6, 0), "states 1000000 tensors"),
    ):
        yield f"GGUF that states {counts}", gguf(Entry(), counts=counts), expected


def _facts() -> Iterator[tuple[str, bytes, str]]:
    number = struct.pack("<I", 32)
    for what, given, expected in (
        ("a text of 2**62", fact(b"a", TEXT, struct.pack("<Q", 2**62)), "goes on to byte 46116860"),
        ("a name of 2**63", struct.pack("<Q", 2**63) + bytes(9), "goes on to byte 92233720368"),
        ("no UTF-8", fact(b"\xff", 4, number), "is no valid Unicode"),
        ("half a character", fact(b"\xed\xa0\x80", 4, number), "is no valid Unicode"),
        ("an unknown type", fact("a", 13, number), "is of the type 13"),
        ("an array of 2**62", fact("a", ARRAY, array(4, 2**62, number)), "goes on to byte 1844"),
        ("texts without end", fact("a", ARRAY, array(TEXT, 2**60, text("a"))), "goes on to byte"),
        ("an array of unknowns", fact("a", ARRAY, array(77, 1, number)), "is of the type 77"),
        ("deep arrays", fact("a", ARRAY, array(ARRAY, 1, b"") * 9 + number), "is of the type 9"),
        ("an alignment of 0", fact("general.alignment", 4, bytes(4)), "general.alignment is '0'"),
        ("an alignment of 4 GB", fact("general.alignment", 4, b"\xff" * 4), "is '4294967295'"),
        ("a negative alignment", fact("general.alignment", 5, b"\xff" * 4), "alignment is '-1'"),
        ("a fractional alignment", fact("general.alignment", 6, number), "general.alignment is"),
        ("an alignment of text", fact("general.alignment", TEXT, text("x")), "alignment is 'x'"),
    ):
        yield f"GGUF with {what}", gguf(Entry(), facts=[given]), expected
    for what, shape in (
        ("fewer numbers", array(5, 2, struct.pack("<2i", 4, 1))),
        ("negative sizes", array(5, 2, struct.pack("<2i", -4, -2))),
        ("fractional sizes", array(6, 1, struct.pack("<f", 8))),
        ("many sizes", array(5, 40, struct.pack("<40i", 8, *[1] * 39))),
    ):
        given = fact("comfy.gguf.orig_shape.weight", ARRAY, shape)
        yield f"GGUF of a shape of {what}", gguf(Entry(), facts=[given]), "is said to be of shape"
    given = fact("comfy.gguf.orig_shape.weight", TEXT, text("8"))
    yield "GGUF of a shape of text", gguf(Entry(), facts=[given]), "is said to be of shape '8'"


def _tensors() -> Iterator[tuple[str, bytes, str]]:
    for what, entry, expected in (
        ("33 dimensions", Entry(sizes=(1,) * 33), "'weight' has 33 dimensions"),
        ("2**64 numbers", Entry(sizes=(2**32, 2**32)), "'weight' has the sizes"),
        ("2**63 rows", Entry(sizes=(0, 2**63)), "'weight' has the sizes"),
        ("a size that wraps", Entry(sizes=(2**62, 4)), "'weight' has the sizes"),
        ("a number too many", Entry(sizes=(9,)), "'weight' ends at byte"),
        ("an offset behind the file", Entry(offset=2**40), "'weight' ends at byte 1099511"),
        ("an offset of 2**64", Entry(offset=2**64 - 32), "'weight' ends at byte 18446744"),
        ("a row of half a block", Entry(sizes=(16, 4), kind=Q4_0), "and its blocks have 32"),
        ("blocks without rows", Entry(sizes=(), kind=Q8_0), "and its blocks have 32"),
        ("a block too many", Entry(sizes=(32, 9), kind=Q8_0), "'weight' ends at byte"),
        ("no UTF-8 as a name", Entry(name=b"\xff"), "is no valid Unicode"),
        ("a type that was removed", Entry(kind=4), "GGML's type 4, which is not read"),
        ("a type to come", Entry(kind=1000), "GGML's type 1000, which is not read"),
        *(
            (f"numbers of {name}", Entry(sizes=(256,), kind=kind), f"GGML's {name}, which is not r")
            for kind, name in ((15, "Q8_K"), (16, "IQ2_XXS"), (19, "IQ1_S"), (34, "TQ1_0"))
        ),
        *(
            (f"numbers of {name}", Entry(sizes=(64,), kind=kind), f"GGML's {name}, which is not re")
            for kind, name in ((39, "MXFP4"), (40, "NVFP4"))
        ),
    ):
        yield f"GGUF with {what}", gguf(entry), expected
    twice = gguf(Entry(), Entry(offset=32), data=DATA * 2)
    yield "GGUF with a name twice", twice, "'weight' is there twice"
    for offset in (0, 4, 31):
        other = Entry(name="other", offset=offset)
        yield f"GGUF overlapping at {offset}", gguf(Entry(), other, data=DATA * 2), "overlaps"
    inside = Entry(name="other", sizes=(1,), offset=8)
    yield "GGUF with one in another", gguf(Entry(), inside), "'other', at byte .* overlaps 'weight'"
