"""What the two clients check and share."""

from __future__ import annotations

import time

import httpx

from marginrm.client.calls import Send
from marginrm.errors import ConfigError

# With more connections than it keeps (20), httpcore 1.0 closes one that is idle as soon as it sees it, and by its source one that
# another thread or task has just been given is idle still: its request fails with "Bad file descriptor" (seen once, of 216).
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def at_least_one(name: str, value: int) -> int:
    """Returns a setting, or raises ConfigError if it is less than 1."""
    if value < 1:
        raise ConfigError(f"{name} = {value}: it must be at least 1.")
    return value


def check_deadline(step: Send) -> None:
    """The timeout is for each read; a body that trickles in must not outlast the deadline all the same."""
    if time.monotonic() > step.until:
        raise httpx.ReadTimeout("the answer was still coming in when the deadline passed")


def checked_url(base_url: str) -> httpx.URL:
    """Returns the server's URL.

    Raises:
        ConfigError: It is none that can be asked.
    """
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"base_url = {base_url!r} is no URL: {error}.") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(f"base_url = {base_url!r}: it must look like http://host:port.")
    return url


def default_headers(api_key: str | None) -> dict[str, str]:
    """Returns what every request says.

    Raises:
        ConfigError: The key cannot stand in a header.
    """
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ConfigError("api_key must be printable ASCII.")
        headers["Authorization"] = f"Bearer {api_key}"
    return headers
