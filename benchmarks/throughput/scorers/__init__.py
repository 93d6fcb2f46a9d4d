"""One module per way to compute rewards. Each runs in a process of its own, some in another Python environment."""
