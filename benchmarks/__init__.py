"""Benchmarks. Each module at this level is a command: `python -m benchmarks.run --help`, from the root of the repository."""
