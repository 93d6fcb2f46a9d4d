"""The HTTP server: routes, micro-batching, metrics."""
