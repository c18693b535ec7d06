"""ONNX Runtime and OpenVINO on fewer instructions than the processor has.

Neither has a setting for it: ONNX Runtime none at all, and `ONEDNN_MAX_CPU_ISA` limits OpenVINO's
oneDNN, not the kernels beside it. Both ask the processor by `cpuid`. So their libraries are copied
with another two bytes in the place of each `cpuid`, which are no instruction, and what is preloaded
answers them (`cpuid.c`). Linux on x86-64; `objdump` and `gcc` are wanted.
"""

import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from benchmarks.worker import ContenderError
from engine.store.cache import cache_folder

CPUID, STAND_IN = b"\x0f\xa2", b"\x0f\x04"
FOUND = re.compile(r"^\s*([0-9a-f]+):\s+0f a2\s+cpuid", re.MULTILINE)
LIBRARIES = {
    "onnxruntime": ("capi/onnxruntime_pybind11_state*.so",),
    "openvino": ("libs/libopenvino.so.*", "libs/libopenvino_intel_cpu_plugin.so"),
}
LOADABLE, PROGRAM_HEADER = 1, "<IIQQQQQQ"
A, B, C, D = range(4)  # registers
Bits = frozenset[tuple[int, int, int, int]]
"""Of answers to cpuid: leaf, subleaf, register, bit."""


def _bits(leaf: int, subleaf: int, register: int, *bits: int) -> Bits:
    return frozenset(product((leaf,), (subleaf,), (register,), bits))


AMX = _bits(7, 0, D, 22, 24, 25) | _bits(7, 1, A, 21) | _bits(7, 1, D, 8)
BFLOAT16 = _bits(7, 1, A, 5) | _bits(7, 1, D, 5) | _bits(7, 0, D, 23)  # with AVX-512 FP16
AVX512 = (
    _bits(7, 0, B, 16, 17, 21, 26, 27, 28, 30, 31)
    | _bits(7, 0, C, 1, 6, 11, 12, 14)
    | _bits(7, 0, D, 2, 3, 8)
    | _bits(7, 1, D, 19)
)
VNNI = _bits(7, 1, A, 4, 23) | _bits(7, 1, D, 4, 10)  # of AVX2
AVX = _bits(7, 0, B, 5) | _bits(1, 0, C, 12, 28, 29)
HIDDEN: Mapping[str, Bits] = {
    "all": frozenset(),
    "AVX-512, no bfloat16": AMX | BFLOAT16,
    "AVX2": AMX | BFLOAT16 | AVX512 | VNNI,
    "SSE4.2": AMX | BFLOAT16 | AVX512 | VNNI | AVX,
}
"""What the processor must not say it has, to be of an instruction set."""


def environment(name: str) -> dict[str, str]:
    """Return the variables of a process whose libraries see an instruction set alone.

    Raises ContenderError where the libraries cannot be copied so.
    """
    if not HIDDEN[name]:
        return {}
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        raise ContenderError("instructions are hidden on Linux on x86-64 alone")
    folders = [_copied(package) for package in LIBRARIES if find_spec(package)]
    mask = " ".join(".".join(map(str, bit)) for bit in sorted(HIDDEN[name]))
    former = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        "LD_PRELOAD": str(_answering()),
        "LATENTRT_CPUID_MASK": mask,
        "PYTHONPATH": os.pathsep.join(filter(None, (*map(str, folders), str(Path.cwd()), *former))),
    }


def _copied(package: str) -> Path:
    """Return a folder with a copy of a package that asks otherwise; made once."""
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent
    libraries = [path for pattern in LIBRARIES[package] for path in source.glob(pattern)]
    key = _key(*(f"{path} {path.stat().st_mtime_ns}" for path in libraries))
    folder = cache_folder() / "benchmarks" / f"instructions-{key}"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part / package, copy_function=_linked, symlinks=True)
        for library in libraries:
            copy = part / package / library.relative_to(source)
            copy.unlink()
            copy.write_bytes(hidden(library))
        part.rename(folder)
    return folder


def _linked(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:  # another disk
        shutil.copy2(source, to)


def hidden(library: Path) -> bytes:
    """Return a library with the stand-in in the place of each cpuid; raises ContenderError."""
    found = _run("objdump", "-d", "-j", ".text", str(library))
    content = bytearray(library.read_bytes())
    segments = [*_segments(bytes(content))]
    for text in FOUND.findall(found):
        address = int(text, 16)
        at = next(
            address - start + offset
            for start, size, offset in segments
            if start <= address < start + size
        )
        assert content[at : at + len(CPUID)] == CPUID
        content[at : at + len(CPUID)] = STAND_IN
    return bytes(content)


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield where an ELF file's segments are loaded, their sizes, and where they are in it."""
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    for i in range(count):
        kind, _, offset, address, _, length, *_ = struct.unpack_from(
            PROGRAM_HEADER, content, start + i * size
        )
        if kind == LOADABLE:
            yield address, length, offset


def _answering() -> Path:
    """Return the library that answers, compiled once."""
    source = Path(__file__).with_name("cpuid.c")
    key = _key(source.read_text(encoding="utf-8"))
    built = cache_folder() / "benchmarks" / f"cpuid-{key}.so"
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        part = built.with_suffix(".part")
        _run("gcc", "-O1", "-shared", "-fPIC", str(source), "-o", str(part))
        part.rename(built)
    return built


def _key(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise ContenderError(f"{command[0]} is not installed; it comes with a compiler") from None
    except subprocess.CalledProcessError as error:
        raise ContenderError(f"{command[0]}: {error.stderr.splitlines()[-1:]}") from error
