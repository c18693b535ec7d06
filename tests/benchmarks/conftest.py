"""What the tests of benchmarks share: the machine's peak is measured with small matrices."""

from collections.abc import Iterator

import pytest

from benchmarks import machine


@pytest.fixture(scope="module", autouse=True)
def small_products() -> Iterator[None]:
    """Take two million operations in place of 324 thousand millions: nobody reads the figure."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(machine, "SIDE", 64)
        yield
