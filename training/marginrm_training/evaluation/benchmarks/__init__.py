"""Published reward-model benchmarks: their file formats, and the scoring rule of each."""
