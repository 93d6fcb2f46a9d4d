"""Sizing: the simulated queue against the formulas of queueing theory, the fleet against counting, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from marginrm.cli.main import build_app
from marginrm.errors import ConfigError
from marginrm.sizing.fleet import PromptTraffic, Request, Scaling, simulate_fleet
from marginrm.sizing.replica import Replica, Traffic, highest_rate, simulate

ONE_BY_ONE = Replica(tokens_per_second=1_000, step_seconds=0, step_tokens=1)  # a request of 100 tokens takes 0.1 s


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_request_in_a_step_is_the_queue_of_the_textbooks(load: float) -> None:
    rate = load / 0.1
    equal = simulate(ONE_BY_ONE, Traffic(tokens=100, spread=0), rate, requests=100_000)
    # Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services, where all are equal.
    assert equal.latencies.mean() == pytest.approx(0.1 * (1 + load / (2 * (1 - load))), rel=0.05)
    assert equal.busy == pytest.approx(load, rel=0.02)
    # M/M/1: the time in the system is exponential with the rate 1 / service - arrivals.
    exponential = simulate(ONE_BY_ONE, Traffic(tokens=100, spread=1), rate, requests=100_000)
    for share in (0.5, 0.99):
        assert exponential.quantile(share) == pytest.approx(-math.log(1 - share) / (10 - rate), rel=0.15)


def test_requests_share_steps_and_full_steps_are_the_capacity() -> None:
    replica = Replica(tokens_per_second=1_000, step_seconds=0.1, step_tokens=1_000)
    traffic = Traffic(tokens=100, spread=0)
    capacity = replica.highest_token_rate(100) / 100  # ten requests in a second
    assert capacity == pytest.approx(10)
    alone = simulate(replica, traffic, 0.01, requests=500)
    assert alone.quantile(0.5) == pytest.approx(0.1 + 0.09)
    assert simulate(replica, traffic, 0.95 * capacity).busy < 1
    beyond = simulate(replica, traffic, 2 * capacity, requests=4_000)
    assert beyond.quantile(0.99) > 100  # it grows with the number of requests


def test_a_step_shorter_than_its_fixed_part_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"step_seconds = 0\.5 must be less than the 0\.1 s of a full step \(100 tokens"
    ):
        Replica(tokens_per_second=1_000, step_seconds=0.5, step_tokens=100)


def test_a_full_queue_rejects_what_exceeds_it() -> None:
    replica = Replica(tokens_per_second=1_000, step_seconds=0, step_tokens=1_000, queue_tokens=2_000)
    load = simulate(replica, Traffic(tokens=100, spread=0), 20)  # twice what it can do
    assert load.rejected == pytest.approx(0.5, abs=0.03)
    assert (
        load.quantile(1) <= 3.0
    )  # the queue holds two seconds of work, and the last step is shared with later requests


def test_the_highest_rate_keeps_the_latency_and_a_higher_one_does_not() -> None:
    replica, traffic = Replica(tokens_per_second=10_000, step_seconds=0.01), Traffic(tokens=300)
    best = highest_rate(replica, traffic, 0.5)
    assert best.quantile(0.99) <= 0.5 < simulate(replica, traffic, 1.1 * best.rate).quantile(0.99)
    with pytest.raises(ConfigError, match="an idle replica takes"):
        highest_rate(replica, traffic, 0.02)


def test_affine_routing_computes_each_prompt_once() -> None:
    traffic = PromptTraffic(prompt_tokens=800, response_tokens=200, samples=16, spread_seconds=5)
    requests = traffic.requests(12, 60, seed=0)
    assert [one.time for one in requests] == sorted(one.time for one in requests)
    spec = Replica(tokens_per_second=20_000)
    loads = {
        routing: simulate_fleet(requests, spec, 4, routing=routing, cache_tokens=1e6)  # type: ignore[arg-type]
        for routing in ("affine", "random")
    }
    once = 800 * len({one.prompt for one in requests}) + sum(one.response_tokens for one in requests)
    assert loads["affine"].tokens_computed * len(requests) == pytest.approx(once)
    each = len({(one.prompt, place) for place in range(4) for one in requests})  # at most once on each replica
    assert once < loads["random"].tokens_computed * len(requests) <= once + 800 * each
    assert len(loads["affine"].latencies) == len(requests)


def test_without_a_cache_the_fleet_is_the_single_queue() -> None:
    generator = np.random.default_rng(0)
    times = generator.exponential(0.125, 20_000).cumsum()
    requests = [Request(float(time), number, 0.0, 100.0) for number, time in enumerate(times)]
    fleet = simulate_fleet(requests, ONE_BY_ONE, 1, routing="random", cache_tokens=0)
    assert fleet.latencies.mean() == pytest.approx(0.1 * (1 + 0.8 / (2 * 0.2)), rel=0.15)
    assert fleet.rejected == 0


def test_the_autoscaler_follows_the_queue_within_its_bounds() -> None:
    requests = PromptTraffic().requests(60, 240, seed=0)
    spec = Replica(tokens_per_second=8_000)
    rule = Scaling(least=1, most=12, target=8_192, start_seconds=30, calm_seconds=60)
    fixed = simulate_fleet(requests, spec, 1, routing="affine", cache_tokens=60_000)
    scaled = simulate_fleet(requests, spec, 1, routing="affine", cache_tokens=60_000, scaling=rule)
    sizes = [size for _, size in scaled.replicas]
    assert 1 < max(sizes) <= 12
    assert all(time >= 45 for time, size in scaled.replicas if size > 1)  # the first look, and the start of a replica
    assert scaled.quantile(0.99) < fixed.quantile(0.99)


def size(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), ["size", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_sizes_for_each_rate() -> None:
    given = ("--tokens-per-second", "10000", "--tokens", "300", "--p99", "1", "--responses-per-minute", "100,100000")
    found = json.loads(size(*given, "--json"))
    one = found["replica"]["responses_per_minute"]
    for fleet, rate in zip(found["fleets"], (100, 100_000), strict=True):
        assert fleet["replicas"] == math.ceil(rate / one) + 1
        assert fleet["p99"] <= 1.05
    assert "100,000" in size(*given)
    with pytest.raises(ConfigError, match="--url"):
        size("--tokens", "300")
    with pytest.raises(ConfigError, match="not a list of numbers"):
        size(*given[:4], "--responses-per-minute", "many")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--tokens", "nan"), "--tokens nan: give a number above 0"),
        (("--tokens", "inf"), "--tokens inf: give a number above 0"),
        (("--tokens", "300", "--p99", "nan"), "--p99 nan: give a number above 0"),
        (("--tokens", "300", "--p99", "0"), "--p99 0: give a number above 0"),
        (("--tokens", "300", "--responses", "100000"), "rejects 100% of these requests: they have 30,000,000 tokens"),
        (("--url", "127.0.0.1:1"), "cannot be read.*such as http://127.0.0.1:8000"),
    ],
)
def test_the_command_refuses_what_no_simulation_can_answer(options: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        size("--tokens-per-second", "9000", *options)
