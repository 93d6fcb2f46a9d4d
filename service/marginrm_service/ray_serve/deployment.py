"""The Ray Serve application: replicas of the app of `marginrm serve`, each with its own queue and models."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from marginrm.errors import ConfigError
from marginrm_service.app import create_app
from marginrm_service.ray_serve.scaling import QUEUED_TOKENS
from marginrm_service.settings import Settings
from marginrm_service.state import Service
from marginrm_service.telemetry import logs
from marginrm_service.telemetry.replicas import Snapshot, exposition

_log = logging.getLogger(__name__)

_ROUTER = "marginrm_service.ray_serve.router.PromptRouter"
_SCRAPE_SECONDS = 3.0  # for all replicas to report their metrics; Prometheus waits for 10 by default
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
        service: Service = application.state.service
        service.scrape = partial(_scrape, service)
        return application

    deploy = serve.deployment(
        name="marginrm",
        # Ray's default of 5 leaves too few requests for a batch, and delays requests that the replica would refuse.
        max_ongoing_requests=len(settings.models) * settings.max_queue_requests + _SPARE,
        graceful_shutdown_timeout_s=settings.drain_seconds + _SHUTDOWN_MARGIN,
        request_router_config={"request_router_class": _ROUTER, "request_router_kwargs": _placement(settings)},
        ray_actor_options={"num_gpus": settings.tensor_parallel if settings.device.startswith("cuda") else 0},
    )
    return deploy(serve.ingress(build)(_Replica)).bind()


def _placement(settings: Settings) -> dict[str, Any]:
    """Returns the router's arguments for replicas that do not hold all models; empty if they do."""
    most = settings.max_loaded_models
    if most is None or most >= len(settings.models):
        return {}
    return {"models": [spec.name for spec in settings.models], "models_per_replica": most}


class _Replica:
    """The replica class of the deployment; `serve.ingress` adds `app`, made in the replica's own process."""

    app: FastAPI

    async def check_health(self) -> None:
        """Returns once the models are loaded and while their workers live. Ray replaces a replica that raises.

        Raises:
            MarginRMError: A model cannot be served, or its worker has died.
        """
        await self.app.state.loaded.wait()
        if self._service.registry.failure:
            raise self._service.registry.failure
        self._service.registry.check_alive()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the tokens that wait or are computed, which `scaling.QueuedTokens` reads."""
        return {QUEUED_TOKENS: self._service.registry.queued_tokens()}

    def snapshot(self) -> Snapshot:
        """Returns this replica's metrics, for a scrape of all replicas."""
        return _snapshot(self._service)

    @property
    def _service(self) -> Service:
        service: Service = self.app.state.service
        return service


async def _scrape(service: Service) -> bytes:
    """Returns the metrics of all replicas, each with the label `replica`.

    A replica that is dying or does not answer in time is left out, and the log says so.
    """
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        replies = await handle.broadcast("snapshot").results_async(timeout_s=_SCRAPE_SECONDS, return_exceptions=True)
    except TimeoutError:
        _log.warning("A replica did not report its metrics within %g s; only this replica's are shown", _SCRAPE_SECONDS)
        replies = [_snapshot(service)]
    failures = [reply for reply in replies if not isinstance(reply, Snapshot)]
    if failures:
        _log.warning("%d replicas did not report their metrics: %s", len(failures), type(failures[0]).__name__)
    return exposition([reply for reply in replies if isinstance(reply, Snapshot)])


def _snapshot(service: Service) -> Snapshot:
    return service.snapshot(serve.get_replica_context().replica_tag)
