"""The HTTP server: routes, queues, models and metrics."""
