"""Batches, the module that computes rewards, and the checks on it."""
