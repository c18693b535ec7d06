"""Archives of torch.save that lie about their entries, storages or tensors, and ones cut short."""

import io
import struct
import zipfile
from collections.abc import Iterator

from tests.support.bad_pickles import (
    call,
    dictionary,
    name,
    number,
    numbers,
    state_dict,
    storage,
    tensor,
    text,
)

DATA = struct.pack("<4f", 1, 2, 3, 4)


def archive(
    pickled: bytes = state_dict(), pack: int = zipfile.ZIP_STORED, **entries: bytes
) -> bytes:
    """Make an archive of a pickle and a storage of four float32 numbers, "0"."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for file, content in {"data.pkl": pickled, "data/0": DATA, **entries}.items():
            target.writestr(zipfile.ZipInfo(f"archive/{file}"), content, pack)
    return buffer.getvalue()


def changed(content: bytes, at: int, form: str, value: int) -> bytes:
    """Put a number into a file."""
    new = struct.pack(form, value)
    return content[:at] + new + content[at + len(new) :]


def boundaries(content: bytes) -> dict[str, int]:
    """Find where the parts of the good archive begin."""
    local, entry = content.index(b"PK\3\4", 1), content.index(b"PK\1\2")
    end = content.index(b"PK\5\6")
    pickled = content.index(b"\x80\x02")
    return {
        "in the first signature": 3,
        "in the first local header": 20,
        "before the first name": 30,
        "before the pickle": pickled,
        "in the pickle": pickled + 40,
        "after the pickle": local,
        "in the second local header": local + 20,
        "before the data": content.index(DATA),
        "in the data": content.index(DATA) + 5,
        "before the directory": entry,
        "in the directory": entry + 20,
        "between the directory's entries": content.index(b"PK\1\2", entry + 1),
        "before the end": end,
        "in the end": end + 10,
        "one byte before the end": len(content) - 1,
    }


def cut() -> Iterator[tuple[str, bytes, str]]:
    """Cut the good archive at each of its boundaries."""
    good = archive()
    for where, at in boundaries(good).items():
        yield f"cut {where}", good[:at], "is no checkpoint" if at < 4 else "is cut off"


def pickles_cut() -> Iterator[tuple[str, bytes, str]]:
    """Cut the pickle inside an archive that is whole."""
    good = state_dict()
    for at in range(0, len(good), 37):
        yield f"the pickle ends at {at}", archive(good[:at]), "its pickle cannot be read at byte"


def lying() -> Iterator[tuple[str, bytes, str]]:
    """Change one fact at a time in the directory or a header."""
    good = archive()
    first, end = good.index(b"PK\1\2"), good.index(b"PK\5\6")
    second, local = good.index(b"PK\1\2", first + 1), good.index(b"PK\3\4", 1)
    yield "two entries in one place", changed(good, second + 42, "<I", 0), "not at byte 0"
    doubled = good.replace(b"archive/data/0", b"archive/data.p").replace(b"data.pkl", b"data.p\0l")
    yield (
        "another name at the entry",
        doubled[: second + 46] + good[second + 46 :],
        "is not at byte",
    )
    twins = archive(**{"data/1": DATA})
    yield "one name twice", twins.replace(b"data/1", b"data/0"), "'archive/data/0' is there twice"
    yield "overlapping entries", overlapping(), "overlaps"
    for field, form, value, expected in (
        (8, "<H", 1, "is encrypted"),
        (10, "<H", 8, "is not as its directory says"),
        (20, "<I", 5, "bytes, and 5 as it is stored"),
        (34, "<H", 1, "is encrypted or in another file"),
        (42, "<I", 2**31, "the file ends at"),
        (42, "<I", 1, "is not at byte 1"),
        (42, "<I", 2**32 - 1, "lacks its ZIP64 sizes"),
        (28, "<H", 2**16 - 1, "ends behind its directory"),
    ):
        yield f"entry's {field} is {value}", changed(good, first + field, form, value), expected
    large = changed(changed(good, second + 20, "<I", 2**31), second + 24, "<I", 2**31)
    yield "an entry of 2 GB", large, "and its directory begins at"
    yield (
        "local header encrypted",
        changed(good, local + 6, "<H", 1),
        "is not as its directory says",
    )
    yield "local header of another kind", changed(good, local, "<I", 0), "is not at byte"
    for field, form, value, expected in (
        (4, "<H", 1, "several parts"),
        (8, "<H", 3, "several parts"),
        (12, "<I", 5, "states 2 entries"),
        (12, "<I", 2**31, "does not end before"),
        (16, "<I", 0, "holds no entry at byte 0"),
        (16, "<I", 2**31, "does not end before"),
        (16, "<I", 2**32 - 1, "no ZIP64 locator"),
        (20, "<H", 9, "its zip directory ends at"),
    ):
        yield f"end's {field} is {value}", changed(good, end + field, form, value), expected
    counts = changed(changed(good, end + 8, "<H", 1), end + 10, "<H", 1)
    yield "fewer entries than there are", counts, "its directory ends at byte"
    many = changed(changed(good, end + 8, "<H", 65534), end + 10, "<H", 65534)
    yield "more entries than there are", many, "states 65534 entries"
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 2**63, 1)
    moved = good[:end] + locator + changed(good, end + 16, "<I", 2**32 - 1)[end:]
    yield "a ZIP64 end beyond the file", moved, "is not at byte 9223372036854775808"


def overlapping() -> bytes:
    """Put a whole entry inside the bytes of another, as small bombs of zip do."""
    inner = archive(**{"data/2": DATA})
    inside = inner[inner.rindex(b"PK\3\4") : inner.index(b"PK\1\2")]
    outer = archive(**{"data/0": inside, "data/1": b"x"})
    third = outer.rindex(b"PK\1\2")
    moved = changed(outer, third + 42, "<I", outer.index(inside))
    moved = changed(changed(moved, third + 20, "<I", len(DATA)), third + 24, "<I", len(DATA))
    return moved[:third] + moved[third:].replace(b"data/1", b"data/2")


def bombs() -> Iterator[tuple[str, bytes, str]]:
    """Pack much into little."""
    deflated = zipfile.ZIP_DEFLATED
    yield "a compressed pickle", archive(state_dict() + bytes(10**7), deflated), "is compressed"
    zeros = archive(big_pickle(), deflated, **{"data/0": bytes(4 * 10**7)})
    yield "compressed storages", zeros, "is compressed"
    yield "a compressed storage", with_a_compressed_storage(), "a storage '0', which is compressed"


def big_pickle() -> bytes:
    shape = (10**7,)
    return b"\x80\x02" + dictionary(a=tensor(storage(count=10**7), 0, shape, (1,))) + b"."


def with_a_compressed_storage() -> bytes:
    """Store the pickle, and compress the storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr(zipfile.ZipInfo("archive/data.pkl"), big_pickle())
        content = bytes(4 * 10**7)
        target.writestr(zipfile.ZipInfo("archive/data/0"), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tensors() -> Iterator[tuple[str, bytes, str]]:
    """Describe tensors that their storages do not hold."""
    for what, value, expected in (
        ("ends behind its storage", tensor(shape=(2, 3)), "ends at value 5 of a storage of 4"),
        ("begins behind its storage", tensor(start=9), "ends at value 13 of a storage of 4"),
        ("begins at 2**62", tensor(start=2**62), "a storage of 4"),
        ("strides too far", tensor(strides=(2**40, 1)), "a storage of 4"),
        ("has 2**40 values of one", tensor(shape=(2**40,), strides=(0,)), "larger than the file"),
        ("has 2**126 values", tensor(shape=(2**63 - 1,) * 2, strides=(0, 0)), "larger than"),
        (
            "has no values of 2**126",
            tensor(shape=(2**63 - 1,) * 2 + (0,), strides=(0,) * 3),
            "larger",
        ),
        ("has a negative size", tensor(shape=(-2, -2)), "a tensor of shape"),
        ("has a negative stride", tensor(strides=(2, -1)), "and strides"),
        ("begins before its storage", tensor(start=-1), "a tensor of shape"),
        ("lacks a stride", tensor(strides=(1,)), "a tensor of shape"),
        ("has 33 dimensions", tensor(shape=(1,) * 33, strides=(1,) * 33), "of type tuple"),
        ("has a size of 2**64", tensor(shape=(2**64, 0)), "of shape .18446744073709551616, 0"),
        ("lacks its storage", tensor(of=b"N"), "a tensor without a storage"),
        ("has a storage that is missing", tensor(storage("7")), "storage '7', which the archive l"),
        ("has a storage outside", tensor(storage("../data.pkl")), "which the archive lacks"),
        ("has a larger storage", tensor(storage(count=5)), "of 5 F32 values, for which"),
        ("has a smaller storage", tensor(storage(count=3)), "of 3 F32 values, for which"),
        ("has a storage of 2**62", tensor(storage(count=2**62)), "the archive holds 16 bytes"),
        ("has another type", tensor(storage(kind="torch.HalfStorage")), "holds 16 bytes"),
        ("is complex", tensor(storage(kind="torch.ComplexFloatStorage")), "ComplexFloatStorage"),
        ("is quantised", tensor(storage(kind="torch.QInt8Storage")), "holds values of torch.QInt8"),
        ("has a storage of numbers", tensor(storage(kind="torch.Size")), "of an unknown type"),
    ):
        yield f"a tensor {what}", archive(state_dict(b=value)), expected
    short = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + b"tQ"
    yield "a storage of three facts", archive(state_dict(b=short)), "no storage's"
    shape = b"(" + b"\x88" * 2 + b"t"
    truth = tensor().replace(numbers((2, 2)), shape)
    yield "a size that is a truth value", archive(state_dict(b=truth)), "a tensor of shape"
    yield "a number for a dictionary", archive(b"\x80\x02" + number(1) + b"."), "of type int, and"
    yield "big-endian", archive(byteorder=b"big"), "was written big-endian"


def calls() -> Iterator[tuple[str, bytes, str]]:
    """Call what a checkpoint may call, with what it does not take."""
    parameters = "torch.nn.modules.container.ParameterDict"
    typed, scalar = "torch._utils._rebuild_tensor_v3", "numpy._core.multiarray.scalar"
    place = number(0), numbers((2, 2)), numbers((2, 1)), b"\x89", b"}"
    nameless = b"(" + text("storage") + name("torch.FloatStorage") + b"N" + text("cpu") + b"NtQ"
    for what, value, expected in (
        ("a size of texts", call("torch.Size", text("a")), "a torch.Size that is none"),
        ("a device without a name", call("torch.device", number(0)), "a torch.device without"),
        ("a set of a number", call("builtins.set", number(1)), "a set that is not made of a list"),
        ("bytes in UTF-8", call("_codecs.encode", text("a"), text("utf-8")), "another encoding"),
        ("bytes in rot13", call("_codecs.encode", text("a"), text("rot13")), "another encoding"),
        ("a dtype of objects", call("numpy.dtype", text("O8")), r"names numpy\.dtype\('O8'\)"),
        ("a dtype of a number", call("numpy.dtype", number(8)), "a numpy dtype without a name"),
        *bad_arrays(),
        ("a number without a dtype", call(scalar, b"N", text("a")), "without its dtype or bytes"),
        (
            "a number without bytes",
            call(scalar, call("numpy.dtype", text("f8")), b"N"),
            "its dtype",
        ),
        ("a parameter of nothing", call("torch._utils._rebuild_parameter", b"N"), "a parameter wi"),
        ("parameters of nothing", call(parameters) + b"}b", "a ParameterDict without parameters"),
        ("parameters of a list", call(parameters) + b"]b", "a ParameterDict without parameters"),
        ("a typed tensor of nothing", call(typed, b"N", *place), "a tensor without a storage"),
        (
            "a tensor without a type",
            call(typed, storage(kind=BYTES, count=16), *place),
            "of an unkn",
        ),
        ("a storage without a name", nameless, "a storage without a name or a size"),
        ("an OrderedDict of a list", call("collections.OrderedDict", b"]"), "cannot be read"),
    ):
        yield what, archive(state_dict(b=value)), expected


def bad_arrays() -> Iterator[tuple[str, bytes, str]]:
    """Let arrays of numpy lie about what the pickle holds of them."""
    make = "numpy._core.multiarray._reconstruct"
    empty = call(make, name("numpy.ndarray"), numbers((0,)), text("b"))
    half = call("numpy.dtype", text("f2"))
    letters = call("numpy.dtype", text("U1"))

    def state(*shape: int, dtype: bytes = half, data: bytes = text("abcd")) -> bytes:
        return empty + b"(" + number(1) + numbers(shape) + dtype + b"\x89" + data + b"tb"

    yield from (
        ("an array of too few bytes", state(3), r"of shape \[3\] in 4 bytes"),
        ("an array of 2**62 numbers", state(2**62, 4), "an array of numpy of shape"),
        ("an array of 2**62 and none", state(2**62, 2, 0, data=text("")), "an array of numpy"),
        ("an array of -1", state(-1), "without its shape"),
        ("an array of no dtype", state(2, dtype=b"N"), "without its dtype"),
        ("an array of no bytes", state(2, data=b"N"), "without its dtype or bytes"),
        ("an array of wide letters", state(2, data=text("ab\u20ac")), "than latin1"),
        ("an array of a class", call(make, b"N", b")", text("b")), "array of numpy of an unknown"),
        ("an array without a state", empty + b"Nb", "an array of numpy without its shape"),
        (
            "a device's tensor of nothing",
            call("torch._utils._rebuild_device_tensor_from_numpy", b"N", b"N", text("mps")),
            "without its numbers",
        ),
        (
            "a device's tensor of letters",
            call(
                "torch._utils._rebuild_device_tensor_from_numpy",
                state(1, dtype=letters),
                b"N",
                text("mps"),
            ),
            "without its numbers",
        ),
        (
            "a letter beyond Unicode",
            call("numpy._core.multiarray.scalar", letters, b"C\4\xff\xff\xff\x7f"),
            "no valid Unicode",
        ),
        (
            "half a letter",
            call("numpy._core.multiarray.scalar", letters, b"C\4\0\xd8\0\0"),
            "no valid Unicode",
        ),
    )


BYTES = "torch.storage.UntypedStorage"
