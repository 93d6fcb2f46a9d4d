"""The checks of the reliability runs: numbers by hand, and faults that must not pass."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from benchmarks.reliability import checks, report
from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.traffic import CheckedRequest, open_loop

FINE = Outcome("best-of-n", 200, 0.5)


def test_percentiles_by_hand():
    values = [float(value) for value in range(1, 101)]
    assert checks.percentile(values, 0.99) == 99
    assert checks.percentile(values, 0.5) == 50
    assert checks.percentile([3.0], 0.99) == 3
    assert checks.percentile([], 0.99) == 0


def test_growth_is_from_the_second_quarter_to_the_last():
    assert checks.growth([(t, 50 if t < 4 else 100) for t in range(16)]) == 0  # growth while caches fill does not count
    assert checks.growth([(t, 100 if t < 12 else 110) for t in range(16)]) == pytest.approx(0.1)
    assert not checks.flat_memory([(t, 100 if t < 12 else 110) for t in range(16)], 0.05).passed


def test_goodput_counts_correct_replies_in_time():
    outcomes = [FINE, replace(FINE, seconds=11), replace(FINE, status=429), replace(FINE, fault="wrong reward")]
    assert checks.goodput(outcomes, deadline=10, start=0, seconds=2) == 0.5


def test_goodput_counts_replies_at_their_arrival():
    outcomes = [replace(FINE, at=at, seconds=3) for at in (0.0, 1.0, 2.0, 7.0)]  # they arrive at 3, 4, 5 and 10
    assert checks.goodput(outcomes, deadline=10, start=4, seconds=2) == 1.0


def test_a_request_without_a_reply_does_not_pass():
    assert checks.answered_once([FINE, FINE], 2).passed
    assert not checks.answered_once([FINE], 2).passed
    assert not checks.answered_once([FINE, Outcome("best-of-n", None, 1, "reset (ReadError)")], 2).passed


def test_refusals_need_a_retry_after():
    refused = Outcome("best-of-n", 429, 0.1, retry_after=True)
    assert checks.only_statuses([FINE, refused], {200, 429}).passed
    assert not checks.only_statuses([replace(refused, retry_after=False)], {200, 429}).passed
    assert not checks.only_statuses([replace(FINE, status=500)], {200, 429}).passed


def test_a_reward_that_differs_or_is_of_another_model_is_wrong():
    request = CheckedRequest({}, {"a": [1.0, 2.0], "b": [3.0, 4.0]})
    ranking = [{"candidate": 1, "reward": 2.0}, {"candidate": 0, "reward": 1.0}]
    reply = {"model": {"revision": "a"}, "prompts": [{"ranking": ranking}]}
    assert request.fault(reply) == ""
    assert request.fault(reply | {"model": {"revision": "b"}}).startswith("wrong reward")
    assert request.fault(reply | {"model": {"revision": "c"}}).startswith("wrong revision")
    assert request.fault(reply | {"prompts": [{"ranking": ranking[:1]}]}).startswith("wrong number")
    assert not checks.right_rewards([replace(FINE, fault="wrong reward, off by 1")], 1).passed
    assert not checks.right_rewards([], 0).passed  # without a comparison the check fails


def test_an_open_loop_does_not_wait_for_replies():
    started = []

    async def send(planned: float, start: float) -> Outcome:
        started.append(planned - start)
        await asyncio.sleep(0.3)  # longer than the time between two requests
        return FINE

    outcomes, sent = asyncio.run(open_loop(send, rate=200, seconds=0.25))
    assert len(outcomes) == sent == len(started)
    assert 25 < sent < 80  # Poisson(50)
    assert max(started) <= 0.25


def test_a_page_keeps_the_text_around_a_section():
    text = "before\n<!-- soak: begin -->\nold\n<!-- soak: end -->\nafter\n"
    run = Report("Soak", "run me", {"load": "much"}, [Check("holds", "it does", True), Check("b", "c", False)])
    found = report.with_section(text, "soak", report.markdown(run))
    assert found.startswith("before\n<!-- soak: begin -->\n```sh\nrun me\n```")
    assert found.endswith("| b | c | **no** |\n<!-- soak: end -->\nafter\n")
    assert not run.passed
    with pytest.raises(ValueError, match="once each"):
        report.with_section(text, "fuzz", "")
    assert all(
        report.PAGE.read_text().count(f"<!-- {key}: begin -->") == 1 for key in ("overload", "soak", "sigterm", "fuzz")
    )
