"""A wheel has every package and every data file; `.ci/run` builds one and names it here."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("latentrt", "engine", "runtime", "serving", "export", "training", "benchmarks")
LEFT_OUT = ("benchmarks/results/",)  # figures, from which a checkout makes its pages


@pytest.fixture
def wheel():
    path = os.environ.get("LATENTRT_WHEEL")
    if not path:
        pytest.skip("LATENTRT_WHEEL names no wheel; .ci/run builds one")
    return zipfile.ZipFile(path)


def test_a_wheel_is_whole(wheel):
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {path for path in listed.stdout.splitlines() if not path.startswith(LEFT_OUT)}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert len(tracked) > 250
    assert held == tracked


def test_a_wheel_brings_the_command(wheel):
    (entries,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "latentrt = latentrt.__main__:main" in wheel.read(entries).decode()
