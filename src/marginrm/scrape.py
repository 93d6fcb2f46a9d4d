"""The metrics of a running server, as its `/metrics` gives them to Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marginrm.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

_PATIENCE = 60.0  # seconds


def scrape(url: str, api_key: str | None = None) -> list[Sample]:
    """Returns the samples of all metrics, each with its name, labels and value.

    Args:
        url: Address of the server, without `/metrics`.
        api_key: API key, sent as a bearer token.

    Raises:
        ConfigError: They cannot be read.
    """
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    address = f"{url.rstrip('/')}/metrics"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx.get(address, headers=headers, timeout=_PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ConfigError(
            f"{address} cannot be read: {reason}. Give the address of a running server, such as http://127.0.0.1:8000."
        ) from error
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise ConfigError(f"{address} needs an API key that the server knows. Give it as MARGINRM_API_KEY.")
    if reply.status_code != httpx.codes.OK:
        raise ConfigError(f"{address} answers {reply.status_code} {reply.reason_phrase}. Is it a marginrm server?")
    try:
        return [sample for family in text_string_to_metric_families(reply.text) for sample in family.samples]
    except ValueError as error:
        raise ConfigError(f"{address} does not answer with metrics. Is it a marginrm server?") from error
