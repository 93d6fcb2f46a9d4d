"""Metrics, drift and logs."""
