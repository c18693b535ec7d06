"""Graphs that tests share: traced once, for every worker and for later runs.

Tracing is what takes the tests' time. A graph depends on these sources and libraries and on nothing
else; a folder is named by all of them, and those of other sources go.
"""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import onnx
import torch.fx
from torch.onnx._internal.exporter._registration import ONNXRegistry

from engine.configs.diffusion import Config
from engine.graphs.graph import Part, Precision
from engine.store.cache import write_atomically
from engine.store.file_lock import locked
from export.tracing import TracedPart, trace

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".pytest_cache" / "traced"
SOURCES = ("engine/configs", "engine/graphs", "export")
LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir")
REGISTRY = cache(ONNXRegistry.from_torchlib)  # of what torch writes its operators with


@cache
def traced_folder() -> Path:
    """Make the folder of graphs of today's sources."""
    digest = sha256(repr([version(name) for name in LIBRARIES]).encode())
    for path in sorted(path for place in SOURCES for path in (ROOT / place).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    folder = FOLDER / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in FOLDER.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@contextmanager
def _fast_tracing() -> Iterator[None]:
    """Spare what changes no byte: garbage, where nodes are from, a table of operators each time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with (
            patch.object(torch.fx.config, "do_not_emit_stack_traces", True),
            patch.object(ONNXRegistry, "from_torchlib", staticmethod(REGISTRY)),
        ):
            yield
    finally:
        if collects:
            gc.enable()


@cache
def trace_once(part: Part, config: Config, precision: Precision) -> TracedPart:
    """Do as `export.tracing.trace` does, unless this or another worker has done so."""
    name = sha256(repr((part, config, precision)).encode()).hexdigest()[:24]
    path = traced_folder() / f"{name}.onnx"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            with _fast_tracing():
                data = trace(part, config, precision).model.SerializeToString(deterministic=True)
            write_atomically(path, lambda file: file.write(data))
    model = onnx.load_from_string(path.read_bytes())
    return TracedPart(part=part, config=config, precision=precision, model=model)
