"""Offline training, calibration and measurement of reward models."""
