"""Ray Serve: replicas of the app of `marginrm serve`, behind Ray's proxies.

    serve run marginrm_service.ray_serve:app models=checkpoints/demo

A request goes from a proxy to one replica. In the proxy, `proxy` reads the request's prompt and `router` chooses the
replica by it. In the controller, `scaling` sets the number of replicas by their queued tokens. Needs the extra `ray`;
docs/deployment.md describes the differences from `marginrm serve`.
"""

from __future__ import annotations

from marginrm_service.ray_serve.deployment import app

__all__ = ["app"]
