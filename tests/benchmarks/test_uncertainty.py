"""The benchmark of uncertainty, with a tiny model."""

from __future__ import annotations

from typer.testing import CliRunner

from benchmarks import uncertainty
from benchmarks.harness.command import app_of


def test_each_length_gets_a_line_with_a_ratio(monkeypatch):
    monkeypatch.delenv("MARGINRM_DATA", raising=False)
    arguments = ["--models", "tiny", "--lengths", "8,64", "--tokens", "256", "--rounds", "3"]
    result = CliRunner().invoke(app_of(uncertainty.main), arguments, catch_exceptions=False)
    lines = [line.split("|") for line in result.stdout.splitlines() if line.startswith("| tiny")]
    assert [line[2].strip() for line in lines] == ["32 responses of 8 tokens", "4 responses of 64 tokens"]
    for *_, milliseconds, ratio, _ in lines:
        assert float(milliseconds) > 0
        assert float(ratio.split()[0]) > 0
