"""Reward functions for trainers that take a function instead of a URL: `trl` and `verl`. Neither imports torch."""
