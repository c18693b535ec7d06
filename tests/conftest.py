"""What every test shares: one thread, so that tests disturb nobody and results repeat.

What a processor runs fastest is not chosen by the tests' machine: it is ONNX Runtime's float32
wherever a test does not say. Files whose imports reach a library of `tests/support/oracles.py` are
marked `oracle`, and are left out where that library is not installed; a test that reaches one only
while it runs is skipped there.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are loaded; of tests' processes too

from engine import engines
from tests.support.oracles import missing, missing_for, oracles

engines.capabilities = frozenset

hypothesis.settings.register_profile("latentrt", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("latentrt")

if sys.platform == "darwin":  # for which NVIDIA's libraries are not made
    collect_ignore_glob = [
        "engine/devices/test_cuda.py",
        "engine/backends/onnxruntime/test_cuda.py",
        "engine/backends/onnxruntime/test_group_norm.py",
        "engine/backends/tensorrt/*",
        "export/test_engines.py",
    ]
# Workers take one file after the other, the longest first: nobody waits for one of them at the end.
FIRST = (
    "runtime/test_family_parity.py",
    "runtime/denoising/test_rows.py",
    "export/test_islands.py",
    "export/test_tracing.py",
    "engine/checkpoints/formats/test_reader_fuzz.py",
    "engine/backends/openvino/test_engine.py",
    "runtime/denoising/test_device_loop.py",
    "engine/backends/tensorrt",
    "benchmarks",
    "runtime/test_calibration.py",
    "serving",
)
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    absent = missing(collection_path)
    for name in absent:
        count = config.stash.setdefault(LEFT_OUT, {})
        count[name] = count.get(name, 0) + 1
    unasked = "not oracle" in config.option.markexpr and oracles(collection_path)
    return True if absent or unasked else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _skipped_without_its_oracle())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _skipped_without_its_oracle())


def _skipped_without_its_oracle() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except Exception as error:
        name = missing_for(error)
        if name is None:
            raise
        pytest.skip(f"needs {name}, which is not installed")


@pytest.fixture(scope="module")
def place() -> Generator[Path, Any, Any]:
    """A folder that is gone after a file's tests: small models are some 20 MB each."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Keep the garbage collector out of imports, and what torch and its kin made out of its way."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if oracles(item.path):
            item.add_marker(pytest.mark.oracle)
    items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    found = (i for i, path in enumerate(FIRST) if nodeid.startswith(f"tests/{path}"))
    return next(found, len(FIRST))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to workers: what a file prepares is prepared once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = terminalreporter.config.stash.get(LEFT_OUT, {})
    if left_out:
        needed = ", ".join(f"{name} ({count})" for name, count in sorted(left_out.items()))
        terminalreporter.write_line(f"files of tests left out, for want of: {needed}")
