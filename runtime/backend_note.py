"""What installing OpenVINO would gain where a large model runs without, said once a day."""

import platform
import sys
from contextlib import suppress
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from engine.engines import X86, Engines
from engine.errors import OutputError, install
from engine.store.cache import cache_folder, write_atomically

# Times as fast as ONNX Runtime's float32, of a Stable Diffusion 1.5 (docs/benchmarks.md).
FLOAT32_GAIN, BFLOAT16_GAIN = "1.3", "2.6"
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # as Linux calls them
CPUINFO = Path("/proc/cpuinfo")


def openvino_note(engines: Engines) -> list[str]:
    """Return the sentence if it is due: on a terminal, where it has not been said today.

    engines: of a model for which nobody chose a backend; the record of the day is in the cache
    """
    due = (
        engines.settings.backend == "cpu"
        and engines.precision == "float32"
        and not engines.is_small
        and find_spec("openvino") is None
        and platform.machine().lower() in X86
        and sys.stderr.isatty()
    )
    return [_sentence()] if due and _is_new_today() else []


def _sentence() -> str:
    if BFLOAT16_FLAGS & _flags():
        gain = f"about {BFLOAT16_GAIN} times as fast here, in bfloat16 with half of the memory"
    else:
        gain = f"about {FLOAT32_GAIN} times as fast here"
    return f"OpenVINO draws a large model {gain}; {install('openvino', 'openvino')}"


def _flags() -> set[str]:
    """Return what Linux says that the processor has; nothing elsewhere."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def _is_new_today() -> bool:
    """Tell whether it was not said today, and keep that it is now; says nothing where it cannot."""
    today = date.today().isoformat()
    with suppress(OSError, OutputError, UnicodeDecodeError):
        path = cache_folder() / "openvino-note"
        if path.is_file() and path.read_text(encoding="utf-8") == today:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(today.encode()))
        return True
    return False
