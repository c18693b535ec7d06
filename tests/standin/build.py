"""Build the stand-in: libraries of the names that ONNX Runtime's CUDA provider loads.

    python build.py PROVIDER HEADERS FOLDER

PROVIDER: libonnxruntime_providers_cuda.so; HEADERS: the folder with cuda_runtime_api.h
What `standin.cpp` has no function for, and the provider may call, is written here: a function that
says its name and that it succeeded.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("cudart.so.13", "cublas.so.13", "cublasLt.so.13", "cuda.so.1", "curand.so.10")
LIBRARIES += ("cudnn.so.9",)
CALLED = re.compile(rb"\0(cudnn[A-Z]\w+)(?=\0)")  # cuDNN's functions are found by name
COMPUTES = re.compile(
    r"cublas\w*([gG]emm|geam|[gG]etr|scal|copy|Matmul$|MatrixTransform$)"
    r"|cudnn\w*(Execute|Forward\w*|AddTensor|ReduceTensor)$"
)


def main() -> None:
    """Build all libraries."""
    provider, headers, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        source = Path(__file__).with_name("standin.cpp")
        compiled = compile_source(source, work / "standin.o", f"-I{headers}")
        written = work / "others.cpp"
        written.write_text(others(called(provider) - defined(compiled)))
        objects = [compiled, compile_source(written, work / "others.o")]
        for name in LIBRARIES:  # each has all functions, under the version that is asked of it
            versions = work / "versions.map"
            versions.write_text(f"lib{name} {{ global: *; }};\n")
            options = [f"-Wl,-soname,lib{name}", f"-Wl,--version-script={versions}"]
            run("g++", "-shared", "-o", folder / f"lib{name}", *objects, *options)


def compile_source(source: Path, to: Path, *options: str) -> Path:
    """Compile one file."""
    run("g++", "-O1", "-fPIC", "-Wno-deprecated-declarations", *options, "-c", source, "-o", to)
    return to


def called(provider: Path) -> set[str]:
    """Return the functions of CUDA's libraries that a provider may call."""
    linked = {name.split("@")[0] for name in symbols("--undefined-only", provider)}
    named = {name.decode() for name in CALLED.findall(provider.read_bytes())}
    return {name for name in linked if re.match(r"(__)?cu", name)} | named


def defined(compiled: Path) -> set[str]:
    """Return the functions that an object file has."""
    return set(symbols("--defined-only", compiled))


def symbols(which: str, file: Path) -> list[str]:
    """Return the names that nm lists of a file."""
    dynamic = ["-D"] if file.suffix == ".so" else []
    listed = run("nm", *dynamic, which, file)
    return [line.split()[-1] for line in listed.splitlines() if line.split()]


def others(names: set[str]) -> str:
    """Write functions that say their names and succeed."""
    lines = ['extern "C" void standin_say(const char *, const char *);']
    for name in sorted(names):
        kind = "library" if COMPUTES.match(name) else "other"
        lines.append(f'extern "C" int {name}() {{ standin_say("{kind}", "{name}"); return 0; }}')
    return "\n".join(lines)


def run(*command: str | Path) -> str:
    """Run a program, and return what it prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
