"""What a public function says of itself: shapes and dtypes of its arrays, and its own errors.

That there is a docstring is ruff's to say. A shape is written as the code writes it, (B, C, h, w),
or said in words: "of any shape", "arrays of the signature".
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("latentrt", "engine", "runtime", "serving", "export", "training", "benchmarks")
ARRAY = re.compile(r"\b(?!(HostOr)?DeviceArray)(\w*Array|NDArray|ndarray|Tensor|Matrix)\b")
# A device's array has its shape and dtype with it.
SHAPE = re.compile(r"\([^()]*,[^()]*\)|\b(u?int|float)\d+\b|\bshapes?\b|\bsignature\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    for statement in body:
        if isinstance(statement, Function | ast.ClassDef) and statement.name.startswith("_"):
            continue
        if isinstance(statement, Function):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield from public_functions(statement.body)


def annotations(function: Function) -> Iterator[str]:
    arguments = function.args
    given = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (ast.unparse(each.annotation) for each in given if each.annotation)
    if function.returns:
        yield ast.unparse(function.returns)


def raised(function: Function) -> Iterator[str]:
    """Names of the errors that are raised in a function's own lines."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            if name[0].isupper() and name not in ("AssertionError", "NotImplementedError"):
                yield name


def complaints(source: str) -> Iterator[str]:
    for function in public_functions(ast.parse(source).body):
        says = ast.get_docstring(function) or ""
        if any(ARRAY.search(each) for each in annotations(function)) and not SHAPE.search(says):
            yield f"{function.name}, line {function.lineno}, gives no shape or dtype"
        for name in sorted({name for name in raised(function) if name not in says}):
            yield f"{function.name}, line {function.lineno}, does not say that it raises {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_say_their_shapes_and_errors(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for complaint in complaints(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('def f(x: NDArray[Any]) -> int:\n    "Sum."', "gives no shape"),
        ('class A:\n    def f(self) -> Tensor:\n        "Run."', "gives no shape"),
        ('def f() -> int:\n    "Sum."\n    raise errors.ModelError("x")', "raises ModelError"),
        ('def f(x: Array) -> int:\n    "Sum (n,) float32; raises E."\n    raise E("x")', None),
        ('def _f(x: Array) -> int:\n    "Sum."', None),
    ],
)
def test_a_docstring_that_lacks_something_is_found(source: str, complaint: str | None) -> None:
    found = list(complaints(source))
    assert [complaint in each for each in found] == ([True] if complaint else [])
