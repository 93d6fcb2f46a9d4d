"""Ray Serve: replicas of the app of `marginrm serve`, behind Ray's proxies.

    serve run marginrm_service.ray_serve:app models=checkpoints/demo

A proxy hands each request to one replica; a replica queues, packs and answers by itself, and tells Ray whether it lives.
Needs the extra `ray`; docs/deployment.md says what differs from `marginrm serve`.
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

_SPARE = 256  # requests beside those that may wait for models: refusals, pages, metrics
_LONGER = 10.0  # seconds for a replica to leave, beyond those in which it finishes what was accepted
# What means something else on Ray, and what to do about it.
_ELSEWHERE = {
    "host": "Ray's proxies listen: set http_options.host in the configuration of `serve deploy`",
    "port": "Ray's proxies listen: set http_options.port in the configuration of `serve deploy`",
    "admin_key_file": "a request reaches one replica, and the others would keep their models: deploy again to change them",
    "rate_limit": "each replica would count for itself: limit requests in front of Ray",
}


def app(arguments: dict[str, Any]) -> serve.Application:
    """Builds the application that `serve run` and `serve deploy` import.

    Args:
        arguments: Settings by name; the others come from the environment, as for `marginrm serve`.

    Raises:
        ConfigError: A setting is not acceptable, or means something else on Ray.
    """
    settings = Settings.load(**arguments)
    for name in sorted(_ELSEWHERE.keys() & settings.model_fields_set):
        raise ConfigError(f"{name} cannot be set on Ray Serve: {_ELSEWHERE[name]}.")
    if not settings.models:
        raise ConfigError("There is no model to serve. Give models=PATH, or set MARGINRM_MODELS.")

    def build() -> FastAPI:
        logs.configure(settings.log_format, settings.log_level)
        application = create_app(settings)
        service: Service = application.state.service
        application.state.loaded = asyncio.Event()  # well or not
        service.registry.on_ready = service.registry.on_failure = application.state.loaded.set
        return application

    deploy = serve.deployment(
        name="marginrm",
        # Ray's 5 would leave nothing to make a batch of, and hold back requests that the replica itself refuses in time.
        max_ongoing_requests=len(settings.models) * settings.max_queue_requests + _SPARE,
        graceful_shutdown_timeout_s=settings.drain_seconds + _LONGER,
        ray_actor_options={"num_gpus": int(settings.device.startswith("cuda"))},
    )
    return deploy(serve.ingress(build)(_Replica)).bind()


class _Replica:
    """What Ray asks of a replica; `serve.ingress` adds `app`, made in the replica's own process."""

    app: FastAPI

    async def check_health(self) -> None:
        """Returns once the models are loaded, and then while their workers live; Ray replaces a replica that raises.

        Raises:
            MarginRMError: A model cannot be served, or its worker has died.
        """
        await self.app.state.loaded.wait()
        service: Service = self.app.state.service
        if service.registry.failure:
            raise service.registry.failure
        service.registry.check_alive()
