"""Runs that overload, disturb, stop and fuzz the server; see docs/reliability.md."""
