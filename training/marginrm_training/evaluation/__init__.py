"""Metrics of a checkpoint on files."""
