"""The browser that all tests of the page share."""

import pytest


@pytest.fixture(scope="session")
def browser():
    from tests.support.browsers import chromium  # playwright may not be there

    with chromium() as started:
        yield started
