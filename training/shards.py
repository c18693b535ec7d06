"""Captioned pictures in tar files, as webdataset writes them: members of one stem are one record.

`000017.jpg` has its caption in `000017.txt`, or in `000017.json` as `caption` or `text`. The files
are read from front to back and nothing of them is unpacked, so they may be of any size.
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from engine.errors import RequestError
from training.captions import PICTURES, Record, texts_of

LARGEST_MEMBER = 2**28  # bytes; a picture of that size is none
LARGEST_TEXT = 2**20


def read_shards(paths: Sequence[Path]) -> Iterator[Record]:
    """Yield the records of tar files, or of all `.tar` files of a folder, in the order of names.

    Raises RequestError when there is none, one is damaged, or a picture has no caption.
    """
    found = [file for path in paths for file in (sorted(path.glob("*.tar*")) or [path])]
    for path in found:
        held = False
        for record in _read_shard(path):
            held = True
            yield record
        if not held:
            raise RequestError(f"{path} holds no picture; members read 000001.jpg, 000001.txt")


def _read_shard(path: Path) -> Iterator[Record]:
    stem, members = None, dict[str, bytes]()
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                inner = PurePosixPath(member.name)
                current = str(inner.parent / inner.name.split(".")[0])
                if stem is not None and current != stem:
                    yield from _record(path, stem, members)
                    members = {}
                stem = current
                suffix = "." + inner.name.partition(".")[2].lower()
                limit = LARGEST_MEMBER if suffix in PICTURES else LARGEST_TEXT
                if suffix in (*PICTURES, ".txt", ".json"):
                    if member.size > limit:
                        raise RequestError(
                            f"{member.name} in {path} has {member.size:,} bytes; up to {limit:,} "
                            "are read: make the file anew"
                        )
                    file = archive.extractfile(member)
                    assert file is not None
                    members[suffix] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise RequestError(f"{path} cannot be read as tar ({error}); restore it") from error
    if stem is not None:
        yield from _record(path, stem, members)


def _record(path: Path, stem: str, members: dict[str, bytes]) -> Iterator[Record]:
    picture = next((members[suffix] for suffix in PICTURES if suffix in members), None)
    if picture is None:
        return
    try:
        if ".txt" in members:
            lines = members[".txt"].decode().splitlines()
            texts = texts_of([line for line in lines if line.strip()])
        else:
            values = json.loads(members[".json"])
            texts = texts_of(values["caption"] if "caption" in values else values["text"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(
            f"{stem} in {path} has no caption ({type(error).__name__}: {error}); put it into "
            f"{stem}.txt, or into {stem}.json as `caption`"
        ) from error
    yield Record(name=f"{stem} in {path}", captions=tuple(texts), read=lambda: picture)
