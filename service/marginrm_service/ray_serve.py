"""Ray Serve: replicas of the app of `marginrm serve`, behind Ray's proxies.

    serve run marginrm_service.ray_serve:app models=checkpoints/demo

A proxy hands each request to one replica. Each replica has its own queue and models, and reports its health to Ray.
Needs the extra `ray`; docs/deployment.md describes the differences from `marginrm serve`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve

from marginrm.errors import ConfigError
from marginrm_service.app import create_app
from marginrm_service.settings import Settings
from marginrm_service.state import Service
from marginrm_service.telemetry import logs

_SPARE = 256  # requests beyond those that may wait for models: refusals, pages, metrics
_SHUTDOWN_MARGIN = 10.0  # seconds for a replica to end, beyond the drain time
# Settings that Ray replaces, each with what to do instead.
_REPLACED_BY_RAY = {
    "host": "Ray's proxies listen: set http_options.host in the configuration of `serve deploy`",
    "port": "Ray's proxies listen: set http_options.port in the configuration of `serve deploy`",
    "admin_key_file": "a request reaches one replica, and the others would keep their models: deploy again to change models",
    "rate_limit": "each replica would count for itself: limit requests in front of Ray",
}


def app(arguments: dict[str, Any]) -> serve.Application:
    """Builds the application that `serve run` and `serve deploy` import.

    Args:
        arguments: Settings by name; the others come from the environment, as for `marginrm serve`.

    Raises:
        ConfigError: A setting is not acceptable, or is replaced by Ray.
    """
    settings = Settings.load(**arguments)
    for name in sorted(_REPLACED_BY_RAY.keys() & settings.model_fields_set):
        raise ConfigError(f"{name} cannot be set on Ray Serve: {_REPLACED_BY_RAY[name]}.")
    if not settings.models:
        raise ConfigError("There is no model to serve. Give models=PATH, or set MARGINRM_MODELS.")

    def build() -> FastAPI:
        logs.configure(settings.log_format, settings.log_level)
        loaded = asyncio.Event()  # or failed to load
        application = create_app(settings, on_ready=loaded.set, on_failure=loaded.set)
        application.state.loaded = loaded
        return application

    deploy = serve.deployment(
        name="marginrm",
        # Ray's default of 5 leaves too few requests for a batch, and delays requests that the replica would refuse.
        max_ongoing_requests=len(settings.models) * settings.max_queue_requests + _SPARE,
        graceful_shutdown_timeout_s=settings.drain_seconds + _SHUTDOWN_MARGIN,
        ray_actor_options={"num_gpus": int(settings.device.startswith("cuda"))},
    )
    return deploy(serve.ingress(build)(_Replica)).bind()


class _Replica:
    """The replica class of the deployment; `serve.ingress` adds `app`, made in the replica's own process."""

    app: FastAPI

    async def check_health(self) -> None:
        """Returns once the models are loaded and while their workers live. Ray replaces a replica that raises.

        Raises:
            MarginRMError: A model cannot be served, or its worker has died.
        """
        await self.app.state.loaded.wait()
        service: Service = self.app.state.service
        if service.registry.failure:
            raise service.registry.failure
        service.registry.check_alive()
