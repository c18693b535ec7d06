"""API keys: a file of names and hashes, so that neither the file nor the memory has a key."""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engine.errors import RequestError

LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Who may ask; hashes: SHA-256 of each key, by its name."""

    hashes: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read lines of `name:sha256-of-the-key`; `#` begins a comment. Raises RequestError."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise RequestError(f"--api-key-file {path} cannot be read ({why})") from error
        hashes = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            found = LINE.fullmatch(text)
            if found is None or found[1] in hashes:
                raise RequestError(
                    f"line {number} of --api-key-file {path} is not a new NAME:SHA256; make one "
                    "with `printf %s KEY | sha256sum`"
                )
            hashes[found[1]] = bytes.fromhex(found[2])
        if not hashes:
            raise RequestError(f"--api-key-file {path} holds no key; write NAME:SHA256 into it")
        return cls(hashes=hashes)

    def name(self, authorization: str) -> str | None:
        """Return whose key a header Authorization holds, None for nobody's.

        It is "Bearer KEY", or "Basic" with the key as password. Every key is compared, in a time
        that does not depend on how much of one is right.
        """
        scheme, _, given = authorization.partition(" ")
        key = given.encode("latin-1", "replace").strip()  # the header's own bytes, as HTTP has them
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(key).digest()
        same = [name for name, kept in self.hashes.items() if hmac.compare_digest(kept, digest)]
        return same[0] if same else None
