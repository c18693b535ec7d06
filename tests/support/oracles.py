"""Which tests compare with libraries that a user does not have, told by what their files import."""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What draws needs none of these: they make the models, files and graphs that tests compare with.
ORACLES = frozenset(
    [
        "accelerate",
        "c2pa",
        "cv2",
        "cryptography",
        "cuda",
        "diffusers",
        "fastapi",
        "ftfy",
        "gguf",
        "httpx",
        "lycoris",
        "matplotlib",
        "ml_dtypes",
        "onnx",
        "onnxscript",
        "openai",
        "openvino",
        "peft",
        "playwright",
        "prometheus_client",
        "ray",
        "resvg_py",
        "safetensors",
        "scipy",
        "skimage",
        "starlette",
        "tensorrt_rtx_bindings",
        "torch",
        "transformers",
        "uvicorn",
    ]
)


def imported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield what a file imports when it is imported itself, as dotted names."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from imported(node.body)


@cache
def oracles(path: Path) -> frozenset[str]:
    """Return the libraries of ORACLES that a file needs to be imported, through others too."""
    found = set()
    for name in imported(ast.parse(path.read_text()).body):
        found |= {name.partition(".")[0]} & ORACLES
        place = ROOT.joinpath(*name.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.exists() and file != path:
                found |= oracles(file)
    return frozenset(found)


def missing(path: Path) -> frozenset[str]:
    """Return those of a file's oracles that are not installed."""
    return frozenset(name for name in oracles(path) if find_spec(name) is None)


def missing_for(error: BaseException | None) -> str | None:
    """Return the oracle for want of which an error was raised, here or in one that it came from."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            name = error.name.partition(".")[0]
            if name in ORACLES and find_spec(name) is None:
                return name
        error = error.__cause__ or error.__context__
    return None
