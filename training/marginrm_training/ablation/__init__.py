"""Ablations: many runs of one configuration, compared."""
