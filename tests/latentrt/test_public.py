"""One import has everything that an app uses, under the names of where it stands."""

import ast
from pathlib import Path

import latentrt
import runtime
from engine import errors

ROOT = Path(__file__).parents[2]


def test_every_name_is_there_once():
    assert sorted(set(latentrt.__all__)) == sorted(latentrt.__all__)
    assert all(hasattr(latentrt, name) for name in latentrt.__all__)


def test_it_has_all_of_the_runtime_and_every_error():
    for name in runtime.__all__:
        assert getattr(latentrt, name) is getattr(runtime, name)
    tree = [each for each in errors.__all__ if isinstance(getattr(errors, each), type)]
    assert len(tree) == 6
    for name in tree:
        assert getattr(latentrt, name) is getattr(errors, name)


def test_what_readme_and_docs_import_is_public():
    """Pages show no import of another place."""
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in page.read_text().split("```python\n")[1:]:
            for node in ast.walk(ast.parse(block.split("```")[0])):
                if isinstance(node, ast.ImportFrom):
                    assert node.module in ("latentrt", "runtime"), page
                    shown.update(alias.name for alias in node.names)
    assert {"Pipeline", "Request", "BackendSettings"} <= shown
    assert shown <= set(latentrt.__all__)
