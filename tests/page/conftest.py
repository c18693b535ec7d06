"""What tests of the page share; imported where it is used, since its libraries may not be there."""

import pytest


@pytest.fixture(scope="session")
def browser():
    from tests.support.browsers import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def runner():
    from tests.support.painted_runners import PaintedRunner

    return PaintedRunner()


@pytest.fixture
def running(runner):
    """A server that draws one row at a time."""
    from tests.support.servers import serving

    with serving(runner, rows=1) as started:
        yield started


@pytest.fixture
def page(browser, running):
    """The server's page, as someone new opens it."""
    from tests.support.browsers import visiting

    with visiting(browser, running.url) as opened:
        yield opened
