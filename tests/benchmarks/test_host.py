"""The benchmark of the host: rates and shares of a tiny run with a real server."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from benchmarks import host
from benchmarks.harness.command import app_of


def test_a_tiny_run_has_rates_and_shares_for_library_and_server(tmp_path) -> None:
    arguments = ["--workloads", "pairs,bon-long", "--rounds", "1", "--scale", "1", "--clients", "4"]
    result = CliRunner().invoke(app_of(host.main), [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    *lines, last = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{name}, {of}" for name in ("pairs", "bon-long") for of in ("library, 1 core", "HTTP, 2 cores")
    ]
    found = json.loads(last)
    for name in ("pairs", "bon-long"):
        stages = found[name]["stage_us"]
        assert list(stages) == ["JSON and validation", "tokenising", "planning", "forward", "delivery"]
        assert all(value > 0 for value in stages.values())
        assert found[name]["library_tokens_per_second"] > 0
        assert found[name]["http_tokens_per_second"] > 0
        assert 0 < found[name]["planning_us"] < stages["planning"] * 100
