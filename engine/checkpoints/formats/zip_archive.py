"""The directory of a zip archive whose entries are stored as they are, to be mapped in place.

Only what torch.save writes is read: one disk, no encryption, ZIP64 where a file is large; nothing
is ever unpacked. The standard library's reader would also take archives with overlapping entries,
and build an object per entry, however many a hostile directory lists.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16 and 4.5.3
"""

import struct
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from engine.checkpoints.formats.tensors import damaged, short
from engine.errors import ModelError

__all__ = ["Entry", "read_directory"]

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
LOCATOR_64 = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
MAX_ENTRIES = 200_000  # a training checkpoint of SDXL has 10,000
ENCRYPTED = 0x2041  # the bits of the flags that say so: all, strongly, or the directory
FULL = 0xFFFFFFFF  # the number is in a field of 64 bits


class Entry(NamedTuple):
    """Where an entry's bytes lie in the archive.

    offset, size: in bytes; of compressed entries as they are packed
    """

    offset: int
    size: int
    is_compressed: bool


def read_directory(path: Path, file: mmap) -> dict[bytes, Entry]:
    """List a mapped archive's entries by name.

    Raises ModelError unless each is inside the file and apart from the others.
    """
    offset, size, count = _find_directory(path, file)
    if count > MAX_ENTRIES or count * CENTRAL.size > size:
        raise damaged(
            path, f"its directory of {size} bytes states {count} entries ({MAX_ENTRIES} at most)"
        )
    entries: dict[bytes, Entry] = {}
    headers: list[tuple[int, int, bytes]] = []
    position, end = offset, offset + size
    for _ in range(count):
        name, entry, header, position = _read_entry(path, file, position, end)
        if name in entries:
            raise damaged(path, f"{_show(name)} is there twice")
        last = entry.offset + entry.size
        if last > offset:
            raise damaged(
                path, f"{_show(name)} ends at byte {last}, and its directory begins at {offset}"
            )
        entries[name] = entry
        headers.append((header, last, name))
    if position != end:
        raise damaged(path, f"its directory ends at byte {position}, and should at {end}")
    headers.sort()
    for (_, last, name), (header, _, other) in pairwise(headers):
        if header < last:
            raise damaged(path, f"{_show(other)}, at byte {header}, overlaps {_show(name)}")
    return entries


def _find_directory(path: Path, file: mmap) -> tuple[int, int, int]:
    """Read the end of an archive: its directory's offset, size and number of entries."""
    position = file.rfind(b"PK\5\6", max(0, len(file) - END.size - 0xFFFF))
    if position < 0 or position + END.size > len(file):
        raise damaged(path, f"it is cut off: no zip directory is at its end, byte {len(file)}")
    _, disk, first, here, count, size, offset, comment = END.unpack_from(file, position)
    if position + END.size + comment != len(file):
        raise damaged(path, f"its zip directory ends at byte {position}, the file at {len(file)}")
    end = position
    if FULL in (size, offset) or count == 0xFFFF:
        locator = position - LOCATOR_64.size
        if locator < 0 or file[locator : locator + 4] != b"PK\6\7":
            raise damaged(path, f"it has no ZIP64 locator before byte {position}")
        end = LOCATOR_64.unpack_from(file, locator)[2]
        if end + END_64.size > locator or file[end : end + 4] != b"PK\6\6":
            raise damaged(path, f"its ZIP64 directory is not at byte {end}, as the locator says")
        disk, first, here, count, size, offset = END_64.unpack_from(file, end)[4:]
    if disk or first or here != count:
        raise damaged(path, "it is one of several parts of a zip archive")
    if offset + size > end:
        raise damaged(
            path, f"its directory, {size} bytes at byte {offset}, does not end before byte {end}"
        )
    return offset, size, count


def _read_entry(path: Path, file: mmap, position: int, end: int) -> tuple[bytes, Entry, int, int]:
    """Read one entry of the directory: name, place, header's offset, where the next one begins."""
    if position + CENTRAL.size > end or file[position : position + 4] != b"PK\1\2":
        raise damaged(path, f"its directory holds no entry at byte {position}")
    fields = CENTRAL.unpack_from(file, position)
    flags, method, packed, size, *sizes, disk = *fields[3:5], *fields[8:14]
    header: int = fields[16]
    name_size, extra_size, comment_size = sizes
    after_name = position + CENTRAL.size + name_size
    after = after_name + extra_size + comment_size
    if after > end:
        raise damaged(path, f"the entry at byte {position} ends behind its directory, at {end}")
    name = file[position + CENTRAL.size : after_name]
    if FULL in (size, packed, header):
        extra = file[after_name : after_name + extra_size]
        size, packed, header = _read_zip64(path, name, extra, (size, packed, header))
    if flags & ENCRYPTED or disk:
        raise ModelError(f"{path}: {_show(name)} is encrypted or in another file; save it again")
    if not method and packed != size:
        raise damaged(path, f"{_show(name)} has {size} bytes, and {packed} as it is stored")
    start = _skip_local_header(path, file, header, name, method)
    return name, Entry(start, packed, bool(method)), header, after


def _read_zip64(path: Path, name: bytes, extra: bytes, fields: tuple[int, ...]) -> list[int]:
    """Replace the fields that are full by their 64-bit values in an entry's extra field."""
    values: list[int] = []
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            whole = min(size, len(extra) - 4) // 8
            values = list(struct.unpack_from(f"<{whole}Q", extra, 4))
            break
        extra = extra[4 + size :]
    if len(values) < fields.count(FULL):
        raise damaged(path, f"{_show(name)} lacks its ZIP64 sizes")
    return [values.pop(0) if field == FULL else field for field in fields]


def _skip_local_header(path: Path, file: mmap, header: int, name: bytes, method: int) -> int:
    """Check the header before an entry's bytes, and return where they begin."""
    if header + LOCAL.size > len(file):
        raise damaged(path, f"{_show(name)} begins at byte {header}, the file ends at {len(file)}")
    fields = LOCAL.unpack_from(file, header)
    name_size, extra_size = fields[9:]
    begin = header + LOCAL.size
    if fields[0] != b"PK\3\4" or file[begin : begin + name_size] != name:
        raise damaged(path, f"{_show(name)} is not at byte {header}, where its directory says")
    if fields[3] != method or fields[2] & ENCRYPTED:
        raise damaged(path, f"{_show(name)}, at byte {header}, is not as its directory says")
    return int(begin + name_size + extra_size)


def _show(name: bytes) -> str:
    """Show an entry's name in a message."""
    return short(name[:100].decode("utf-8", "replace"))
