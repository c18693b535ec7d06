import base64
import hashlib
import io
import json
import subprocess
import tarfile

import pytest

from engine.errors import ModelError
from training import packages
from training.packages import PACKAGES, Package, fetch, read_member

CONTENT = b"not npm's"
PACKAGE = Package(
    name="@sets/icons",
    version="1.0.0",
    integrity=base64.b64encode(hashlib.sha512(CONTENT).digest()).decode(),
    licence="MIT",
    author="Somebody",
)


def test_an_archive_is_called_what_npm_calls_it():
    assert PACKAGE.archive_name == "sets-icons-1.0.0.tgz"


def test_an_archive_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", None)
    (tmp_path / PACKAGE.archive_name).write_bytes(CONTENT)
    assert fetch(PACKAGE, tmp_path) == tmp_path / PACKAGE.archive_name


def test_npm_packs_the_recorded_version(tmp_path, monkeypatch):
    def run(command, *, cwd, **_):
        assert command[:3] == ["npm", "pack", "@sets/icons@1.0.0"]
        (cwd / PACKAGE.archive_name).write_bytes(CONTENT)

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert fetch(PACKAGE, tmp_path / "new").read_bytes() == CONTENT


def test_another_archive_is_refused(tmp_path):
    (tmp_path / PACKAGE.archive_name).write_bytes(CONTENT + b".")
    with pytest.raises(ModelError, match="delete the file"):
        fetch(PACKAGE, tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("no npm here"), "no npm here"),
        (subprocess.CalledProcessError(1, "npm", stderr="404 Not Found"), "404 Not Found"),
    ],
)
def test_a_missing_or_failing_npm_is_told(tmp_path, monkeypatch, error, message):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(ModelError, match=rf"{message}.*install Node\.js's npm, or put sets-icons"):
        fetch(PACKAGE, tmp_path)


def test_a_member_is_read_without_unpacking(tmp_path):
    content = json.dumps({"ä": 1}).encode()
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/facts.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    assert read_member(tmp_path / "a.tgz", "facts.json") == {"ä": 1}


def test_every_package_is_pinned_by_a_sha512():
    for package in PACKAGES:
        assert len(base64.b64decode(package.integrity)) == 64
        assert package.licence in ("MIT", "Apache-2.0", "CC-BY-4.0")
