"""Products in two parts: the same values, and a table that is chosen by time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from marginrm.tuning import row_splits

KEY = torch.float32, 8, 4


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_splits, "_tables", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def slow_at(*units: int):
    """Returns a product that takes long for some numbers of rows, and the sizes that it was called with."""
    weight, calls = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        if -(-len(rows) // 64) in units:
            time.sleep(0.02)
        return rows @ weight

    return product, calls, weight


def test_a_slow_number_of_rows_is_computed_in_two_parts() -> None:
    product, calls, weight = slow_at(3, 7)
    assert row_splits.measure({KEY: product})
    for shape, parts in (((1, 64 * 7, 8), 2), ((64 * 7, 8), 2), ((64 * 7 - 5, 8), 2), ((64 * 5, 8), 1)):
        calls.clear()
        inputs = torch.randn(*shape)
        torch.testing.assert_close(row_splits.in_parts(product, inputs, 4), inputs @ weight, atol=1e-5, rtol=1e-5)
        assert (len(calls), sum(calls)) == (parts, inputs.numel() // 8)
        assert not {-(-rows // 64) for rows in calls} & {3, 7}


def test_products_of_one_thread_and_of_large_weights_stay_whole() -> None:
    product, calls, _ = slow_at(3)
    assert not row_splits.measure({(torch.float32, 2**12, 2**12): product})
    torch.set_num_threads(1)
    assert not row_splits.measure({KEY: product})
    assert not calls
