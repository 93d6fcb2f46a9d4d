"""Rewards per second of marginrm and its peers, on the same texts in one run; see docs/benchmarks.md."""
