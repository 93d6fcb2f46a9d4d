"""How much may wait, and what who comes too many is told."""

from __future__ import annotations

import pytest

from marginrm_service.engine.admission import Admission
from marginrm_service.errors import OverloadedError, RequestTooLargeError, WouldBeLateError


def test_a_permit_takes_room_until_its_tokens_are_computed_and_it_leaves():
    door = Admission(max_tokens=100, max_requests=10)
    with door.enter(60) as permit:
        assert (door.tokens, door.requests) == (60, 1)
        permit.settle(80)
        permit.spend(30)
        assert door.tokens == 50
        permit.spend(500)  # a cut group costs more than planned; the room never goes below nothing
        assert (door.tokens, door.requests) == (0, 1)
    assert (door.tokens, door.requests) == (0, 0)


def test_who_finds_no_room_is_told_when_to_come_again():
    door = Admission(max_tokens=100, max_requests=10)
    with door.enter(90):
        with pytest.raises(OverloadedError, match="90 tokens") as caught:
            door.enter(11)
        assert caught.value.retry_after == 1
        door.measured(tokens=10, seconds=1.0, started=0.0)
        with pytest.raises(OverloadedError) as caught:
            door.enter(11)
        assert caught.value.retry_after == 5  # half of 90 tokens at 10 tokens/s
    assert (door.tokens, door.requests) == (0, 0)


def test_requests_are_bounded_too():
    door = Admission(max_tokens=100, max_requests=1)
    with door.enter(0), pytest.raises(OverloadedError):
        door.enter(0)


def test_what_never_fits_is_not_sent_round_in_circles():
    door = Admission(max_tokens=100, max_requests=1)
    with door.enter(100) as permit, pytest.raises(RequestTooLargeError, match="several parts"):
        permit.settle(101)
    assert (door.tokens, door.requests) == (0, 0)


def test_the_wait_is_bounded():
    door = Admission(max_tokens=10_000_000, max_requests=2)
    door.measured(tokens=1, seconds=1.0, started=0.0)
    with door.enter(9_000_000):
        assert door.retry_after() == 60


def busy(door: Admission, tokens: int, *, bulk: bool = False) -> None:
    """Lets a request in that stays."""
    door.enter(tokens, bulk=bulk).__enter__()


def test_before_anything_was_measured_nobody_would_be_late():
    door = Admission(max_tokens=10_000, max_requests=10)
    busy(door, 5_000)
    door.enter(5_000, seconds=0.001)


def test_the_rate_is_that_of_the_tokens_and_a_tiny_step_says_nothing_of_it():
    door = Admission(max_tokens=10_000, max_requests=10, turn=100)
    door.measured(tokens=1_000, seconds=1.0, started=0.0)
    door.measured(tokens=99, seconds=5.0, started=0.0)
    assert door.expected_seconds(100) == pytest.approx(0.1)
    door.measured(tokens=100, seconds=0.2, started=0.0)
    assert door.expected_seconds(900) == pytest.approx(900 * (0.8 + 0.2) / (800 + 100))


def test_who_could_not_be_answered_in_time_is_told_when_to_come_again():
    door = Admission(max_tokens=10_000, max_requests=10, turn=1_000)
    door.measured(tokens=1_000, seconds=10.0, started=0.0)
    busy(door, 600)
    busy(door, 300)
    assert door.expected_seconds(100) == 10.0
    door.enter(100, seconds=14.3)  # its deadline leaves 0.7 of 14.3 s
    with pytest.raises(WouldBeLateError, match=r"3 requests .* 14\.2 s") as caught:
        door.enter(100, seconds=14.2)
    assert caught.value.retry_after == 2  # the third request has added 1 s: 11 s, and 9.94 s are left


def test_a_lone_pair_waits_for_a_turn_of_a_huge_request_and_not_for_its_end():
    door = Admission(max_tokens=10_000_000, max_requests=10, turn=1_000)
    door.measured(tokens=1_000, seconds=1.0, started=0.0)
    busy(door, 1_000_000)
    assert door.expected_seconds(200) == 1.2
    assert door.expected_seconds(3_000) == 6.0


def test_bulk_work_waits_for_all_and_delays_little():
    door = Admission(max_tokens=100_000, max_requests=10, turn=100)
    door.measured(tokens=100, seconds=1.0, started=0.0)
    busy(door, 9_000)
    busy(door, 6_000, bulk=True)
    assert door.expected_seconds(50, bulk=True) == 0.5 + 1 + 90
    assert door.expected_seconds(200) == (200 + 200 + 400 / 3) / 100


def test_an_idle_server_tries_what_will_probably_be_late():
    door = Admission(max_tokens=10_000, max_requests=10)
    door.measured(tokens=10, seconds=1.0, started=0.0)
    with door.enter(1_000, seconds=1.0), pytest.raises(WouldBeLateError):
        door.enter(1_000, seconds=1.0)


def test_pauses_between_steps_count_while_work_waits():
    door = Admission(max_tokens=10_000, max_requests=10)
    with door.enter(500):
        door.measured(tokens=100, seconds=1.0, started=0.0)
        door.measured(tokens=100, seconds=1.0, started=3.0)  # 2 s after the last one had ended
    assert door.expected_seconds(180) == pytest.approx(0.8 + 2.0 + 1.0)


def test_a_pause_in_which_nobody_waits_does_not_count():
    door = Admission(max_tokens=10_000, max_requests=10)
    door.measured(tokens=100, seconds=1.0, started=0.0)
    door.measured(tokens=100, seconds=1.0, started=50.0)
    assert door.expected_seconds(180) == pytest.approx(0.8 + 1.0)
