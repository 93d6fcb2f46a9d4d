"""Measures marginrm against its peers: `python -m benchmarks.run --help`, from the root of the repository."""
