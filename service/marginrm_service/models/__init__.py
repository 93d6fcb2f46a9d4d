"""Loaded models: loading, scoring, names and swaps."""
