"""Jobs, the fair queue, steps, admission and the worker. Imports neither HTTP nor Prometheus."""
