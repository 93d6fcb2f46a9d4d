"""The benchmark of products: a row for each shape and number of rows, and a clear word where there is nothing to compare."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks import products
from benchmarks.harness.command import app_of
from support.tiles import needs_tiles


@needs_tiles
def test_a_row_for_each_product() -> None:
    arguments = ["--shapes", "64x96,96x32", "--rows", "5,64", "--rounds", "2"]
    lines = CliRunner().invoke(app_of(products.main), arguments, catch_exceptions=False).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in cells[1:]] == [[rows, shape] for shape in ("64 x 96", "96 x 32") for rows in ("5", "64")]
    assert all(float(number.rstrip("x")) >= 0 for row in cells[1:] for number in row[2:])


def test_other_processors_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "supported", lambda: False)
    result = CliRunner().invoke(app_of(products.main), [])
    assert result.exit_code == 2
    assert "no matrix tiles (AMX)" in result.output
