"""Jobs, the fair queue, steps, admission and the worker; no HTTP and no Prometheus."""
