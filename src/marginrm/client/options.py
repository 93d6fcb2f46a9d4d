"""Options of both clients: checks, headers and connection limits."""

from __future__ import annotations

import httpx

from marginrm.errors import ConfigError

# Every connection is kept. httpcore 1.0 closes idle connections above its keep-alive limit (20) and counts one that was just
# handed to another thread as idle, so that request fails with "Bad file descriptor" (seen in 1 of 216).
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def at_least_one(name: str, value: int) -> int:
    """Returns a setting, or raises ConfigError if it is less than 1."""
    if value < 1:
        raise ConfigError(f"{name} = {value}: it must be at least 1.")
    return value


def checked_url(base_url: str) -> httpx.URL:
    """Returns the server's URL.

    Raises:
        ConfigError: It is not a valid http or https URL.
    """
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"base_url = {base_url!r} is not a valid URL: {error}.") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(f"base_url = {base_url!r}: it must look like http://host:port.")
    return url


def default_headers(api_key: str | None) -> dict[str, str]:
    """Returns the headers of every request.

    Raises:
        ConfigError: The key is not valid in a header.
    """
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ConfigError("api_key must be printable ASCII.")
        headers["Authorization"] = f"Bearer {api_key}"
    return headers
