"""A training run and what it needs."""
