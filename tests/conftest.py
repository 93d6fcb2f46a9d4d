"""Settings of every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Files with few tests that run for minutes. They start first; at the end, the last of them would run alone.
_LONG = (
    "test_gpu.py",
    "test_throughput.py",
    "test_training.py",
    "test_odd_rows.py",
    "test_distributed.py",
    "test_train.py",
    "test_ablation.py",
    "test_compiling.py",
    "test_process.py",
    "test_cli.py",
    "test_compiled.py",
)

# Timings never decide a test, so Hypothesis does not time its examples.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first; `--no-loadscope-reorder` keeps them there, where xdist sorts by the number of tests."""
    items.sort(key=lambda item: item.path.name not in _LONG)
