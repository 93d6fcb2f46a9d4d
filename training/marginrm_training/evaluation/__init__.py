"""Measures of a checkpoint on files."""
