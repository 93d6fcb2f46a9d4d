"""Reward functions for trainers that have no URL to set: `trl` and `verl`. Neither needs torch here."""
