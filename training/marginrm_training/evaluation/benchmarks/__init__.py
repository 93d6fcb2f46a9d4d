"""Published reward-model benchmarks: their files as published, and each one's own rule of scoring."""
