"""Ablations: runs of one configuration that differ in a few settings, compared on the same files."""
