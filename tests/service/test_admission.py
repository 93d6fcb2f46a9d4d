"""Admission control: how much may wait, and the reply to a refused request."""

from __future__ import annotations

import pytest

from marginrm_service.engine.admission import Admission
from marginrm_service.errors import OverloadedError, RequestTooLargeError, WouldBeLateError


def test_a_permit_holds_capacity_until_its_tokens_are_computed_and_it_ends():
    admission = Admission(max_tokens=100, max_requests=10)
    with admission.acquire(60) as permit:
        assert (admission.tokens, admission.requests) == (60, 1)
        permit.set_cost(80)
        permit.release(30)
        assert admission.tokens == 50
        permit.release(500)  # a cut group costs more than planned; the capacity never becomes negative
        assert (admission.tokens, admission.requests) == (0, 1)
    assert (admission.tokens, admission.requests) == (0, 0)


def test_without_capacity_a_request_is_refused_with_retry_after():
    admission = Admission(max_tokens=100, max_requests=10)
    with admission.acquire(90):
        with pytest.raises(OverloadedError, match="90 tokens") as caught:
            admission.acquire(11)
        assert caught.value.retry_after == 1
        admission.observe_step(tokens=10, seconds=1.0, started=0.0)
        with pytest.raises(OverloadedError) as caught:
            admission.acquire(11)
        assert caught.value.retry_after == 5  # half of 90 tokens at 10 tokens/s
    assert (admission.tokens, admission.requests) == (0, 0)


def test_the_number_of_requests_is_bounded():
    admission = Admission(max_tokens=100, max_requests=1)
    with admission.acquire(0), pytest.raises(OverloadedError):
        admission.acquire(0)


def test_a_request_larger_than_the_queue_is_refused_for_good():
    admission = Admission(max_tokens=100, max_requests=1)
    with admission.acquire(100) as permit, pytest.raises(RequestTooLargeError, match="several parts"):
        permit.set_cost(101)
    assert (admission.tokens, admission.requests) == (0, 0)


def test_retry_after_is_bounded():
    admission = Admission(max_tokens=10_000_000, max_requests=2)
    admission.observe_step(tokens=1, seconds=1.0, started=0.0)
    with admission.acquire(9_000_000):
        assert admission.retry_after() == 60


def busy(admission: Admission, tokens: int, *, bulk: bool = False) -> None:
    """Admits a request that stays."""
    admission.acquire(tokens, bulk=bulk).__enter__()


def test_before_the_first_step_no_request_is_refused_for_lateness():
    admission = Admission(max_tokens=10_000, max_requests=10)
    busy(admission, 5_000)
    admission.acquire(5_000, seconds=0.001)


def test_the_rate_is_that_of_tokens_and_tiny_steps_are_left_out():
    admission = Admission(max_tokens=10_000, max_requests=10, quantum=100)
    admission.observe_step(tokens=1_000, seconds=1.0, started=0.0)
    admission.observe_step(tokens=99, seconds=5.0, started=0.0)
    assert admission.expected_seconds(100) == pytest.approx(0.1)
    admission.observe_step(tokens=100, seconds=0.2, started=0.0)
    assert admission.expected_seconds(900) == pytest.approx(900 * (0.8 + 0.2) / (800 + 100))


def test_a_request_that_would_miss_its_deadline_is_refused_with_retry_after():
    admission = Admission(max_tokens=10_000, max_requests=10, quantum=1_000)
    admission.observe_step(tokens=1_000, seconds=10.0, started=0.0)
    busy(admission, 600)
    busy(admission, 300)
    assert admission.expected_seconds(100) == 10.0
    admission.acquire(100, seconds=14.3)  # its deadline leaves 0.7 of 14.3 s
    with pytest.raises(WouldBeLateError, match=r"3 requests .* 14\.2 s") as caught:
        admission.acquire(100, seconds=14.2)
    assert caught.value.retry_after == 2  # the third request has added 1 s: 11 s, and 9.94 s are left


def test_a_single_pair_waits_for_one_turn_of_a_huge_request():
    admission = Admission(max_tokens=10_000_000, max_requests=10, quantum=1_000)
    admission.observe_step(tokens=1_000, seconds=1.0, started=0.0)
    busy(admission, 1_000_000)
    assert admission.expected_seconds(200) == 1.2
    assert admission.expected_seconds(3_000) == 6.0


def test_bulk_work_waits_for_interactive_work_and_hardly_delays_it():
    admission = Admission(max_tokens=100_000, max_requests=10, quantum=100)
    admission.observe_step(tokens=100, seconds=1.0, started=0.0)
    busy(admission, 9_000)
    busy(admission, 6_000, bulk=True)
    assert admission.expected_seconds(50, bulk=True) == 0.5 + 1 + 90
    assert admission.expected_seconds(200) == (200 + 200 + 400 / 3) / 100


def test_an_idle_server_accepts_a_request_that_will_probably_be_late():
    admission = Admission(max_tokens=10_000, max_requests=10)
    admission.observe_step(tokens=10, seconds=1.0, started=0.0)
    with admission.acquire(1_000, seconds=1.0), pytest.raises(WouldBeLateError):
        admission.acquire(1_000, seconds=1.0)


def test_pauses_between_steps_count_while_work_waits():
    admission = Admission(max_tokens=10_000, max_requests=10)
    with admission.acquire(500):
        admission.observe_step(tokens=100, seconds=1.0, started=0.0)
        admission.observe_step(tokens=100, seconds=1.0, started=3.0)  # 2 s after the last one had ended
    assert admission.expected_seconds(180) == pytest.approx(0.8 + 2.0 + 1.0)


def test_a_pause_without_waiting_work_does_not_count():
    admission = Admission(max_tokens=10_000, max_requests=10)
    admission.observe_step(tokens=100, seconds=1.0, started=0.0)
    admission.observe_step(tokens=100, seconds=1.0, started=50.0)
    assert admission.expected_seconds(180) == pytest.approx(0.8 + 1.0)
