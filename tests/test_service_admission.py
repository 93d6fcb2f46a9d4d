"""How much may wait, and what who comes too many is told."""

from __future__ import annotations

import pytest

from marginrm_service.admission import Admission
from marginrm_service.errors import OverloadedError, RequestTooLargeError


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
        door.measured(tokens=10, seconds=1.0)
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
    door.measured(tokens=1, seconds=1.0)
    with door.enter(9_000_000):
        assert door.retry_after() == 60
