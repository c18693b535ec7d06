"""How much is taken on, by a rate that is measured, and when to come again."""

import pytest

from serving.admission import Admission
from serving.errors import BadRequestError, BusyError
from serving.limits import Limits


def measured(rate, **limits):
    admission = Admission(limits=Limits(**limits))
    admission.turned(rate, 1.0)
    return admission


def test_before_anything_is_measured_only_the_number_is_bounded():
    admission = Admission(limits=Limits(jobs=3))
    for _ in range(3):
        admission.admit(10_000.0)
    with pytest.raises(BusyError) as refused:
        admission.admit(1.0)
    assert refused.value.retry_after == 1


def test_work_is_bounded_in_seconds():
    admission = measured(10.0, queue_seconds=120.0)
    admission.admit(1100.0)
    admission.admit(200.0)  # 110 s wait, which is not too much yet
    with pytest.raises(BusyError) as refused:
        admission.admit(1.0)
    assert admission.seconds == pytest.approx(130.0)
    assert refused.value.retry_after == 60, "at most a minute"
    admission.turned(1000.0, 100.0)
    assert admission.seconds == pytest.approx(30.0)
    admission.admit(1.0)


def test_retry_after_is_what_is_measured():
    admission = measured(10.0, jobs=1)
    admission.admit(200.0)
    assert admission.retry_after == 10
    with pytest.raises(BusyError, match="about 20 s"):
        admission.admit(1.0)
    admission.left(200.0)
    assert (admission.jobs, admission.work) == (0, 0.0)


def test_one_slow_turn_at_the_start_is_soon_forgotten():
    admission = Admission(limits=Limits())
    admission.turned(1.0, 10.0)
    for _ in range(9):
        admission.turned(1.0, 0.1)
    assert admission.rate == pytest.approx(9.01)
    for _ in range(500):
        admission.turned(1.0, 0.5)
    assert admission.rate == pytest.approx(2.0, rel=0.01)


def test_nobody_is_kept_out_by_a_flood_of_others():
    """One caller fills the queue: others come in up to an equal share each, and no further."""
    admission = Admission(limits=Limits(jobs=12))
    for _ in range(12):
        admission.admit(1.0, "flood")
    with pytest.raises(BusyError):
        admission.admit(1.0, "flood")
    for _ in range(6):
        admission.admit(1.0, "second")
    with pytest.raises(BusyError):
        admission.admit(1.0, "second")
    for _ in range(4):
        admission.admit(1.0, "third")
    admission.admit(1.0, "fourth")
    admission.admit(1.0, "fourth")
    with pytest.raises(BusyError):
        admission.admit(1.0, "fifth")
    assert admission.jobs == 24, "twice as many are the most"
    for caller, count in (("flood", 12), ("second", 6), ("third", 4), ("fourth", 2)):
        for _ in range(count):
            admission.left(0.0, caller)
    assert not admission._jobs_of


def test_a_deadline_that_cannot_be_kept_is_refused_at_once():
    admission = measured(10.0)
    admission.admit(100.0, deadline_seconds=10.0)
    with pytest.raises(BadRequestError):
        admission.admit(100.0, deadline_seconds=19.0)
    admission.admit(100.0, deadline_seconds=21.0)
    with pytest.raises(BadRequestError):
        admission.admit(1.0, deadline_seconds=-5.0)
    assert admission.jobs == 2
