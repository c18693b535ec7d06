"""The bar: pictures, their rate, the time that is left; lines where there is no terminal."""

import io
import sys

import pytest

from runtime.batch.lines import Line
from runtime.batch.progress import Progress, duration, rate


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_a_terminal_has_a_bar(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(10, 4, clock=clock)
    for clock.now in (2.0, 4.0, 6.0):
        progress.drew()
    bar, end = sys.stderr.getvalue().split("\r")[-1], "13/14 pictures, 30.0 a minute, 2 s left"
    assert bar.endswith(end)
    assert bar.count("█") == 30 * 13 // 14
    progress.lose(Line(number=7, error="it is bad"), 1)
    shown = sys.stderr.getvalue()
    assert "\nline 7 is passed over: it is bad\n" in shown.replace("\r\x1b[2K", "\n")
    assert shown.endswith("14/14 pictures, 30.0 a minute\n")


def test_elsewhere_a_line_a_minute_is(capsys, clock):
    progress = Progress(0, 200, clock=clock)
    for clock.now in range(1, 151):
        progress.drew()
    assert capsys.readouterr().err.splitlines() == [
        "60/200 pictures, 1.0 a second, 2 min left",
        "120/200 pictures, 1.0 a second, 1 min left",
    ]


def test_nobody_to_tell(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress(0, 2)
    progress.drew()
    progress.lose(Line(number=1, error="x"), 1)
    assert (progress.drawn, progress.lost) == (1, 1)


@pytest.mark.parametrize(
    ("a_second", "said"), [(12.34, "12.3 a second"), (0.5, "30.0 a minute"), (0.01, "36.0 an hour")]
)
def test_rates_have_a_unit_that_fits(a_second, said):
    assert rate(a_second) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1 min"), (3599, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_times_have_two_units_at_most(seconds, said):
    assert duration(seconds) == said
