"""The planning benchmark prints a cost for each of its shapes."""

from __future__ import annotations

import pytest

from benchmarks import host


def test_each_shape_has_a_line_with_its_tokens_and_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_REPEATS", 2)
    host.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, tokens in zip(lines, ("2,880", "4,928", "19,840"), strict=True):
        shape, plan, batch = line.split(tokens)[0], *line.split(tokens)[1].split()
        assert shape.strip()
        assert 0 < float(plan) <= float(batch)
