"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# Timings never decide a test, so Hypothesis does not time its examples.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")
