"""A vLLM server's `/pooling`: token ids in, raw logits out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from marginrm.errors import ConfigError
from marginrm_service.errors import UpstreamRefusedError, UpstreamUnavailableError

_QUICK_SECONDS = 10.0  # for questions that take no forward pass, and to connect
_TRIES = 2  # a connection that was idle may be closed by the other side at the moment of its next use
_RETRY_AFTER = 5  # seconds
_LONGEST_RETRY = 60
_UNAVAILABLE = frozenset({429, 502, 503, 504})
_KEY_REFUSED = frozenset({401, 403})


class Served(NamedTuple):
    """What a vLLM server says of itself.

    Attributes:
        name: The model's name there.
        max_length: The most tokens of a sequence.
    """

    name: str
    max_length: int


class VllmClient:
    """Calls one vLLM server. Thread-safe.

    Args:
        url: Where the server is, without a path of its API.
        key: The API key that it asks for, or None.
        seconds: The longest time to wait for the rewards of one request.
    """

    def __init__(self, url: str, key: str | None = None, *, seconds: float) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(seconds, connect=min(_QUICK_SECONDS, seconds)),
        )

    def check_health(self) -> None:
        """Returns if the server takes requests.

        Raises:
            UpstreamUnavailableError: It does not.
        """
        self._call("GET", "/health", timeout=_QUICK_SECONDS)

    def served(self) -> Served:
        """Returns what the server computes.

        Raises:
            UpstreamUnavailableError, UpstreamRefusedError: It does not answer, or not as vLLM does.
        """
        models = self._json("GET", "/v1/models", timeout=_QUICK_SECONDS).get("data") or []
        base = [one for one in models if not one.get("parent")]  # the others are adapters on it
        if len(base) != 1 or not base[0].get("max_model_len"):
            raise UpstreamRefusedError(
                "The upstream does not serve one model as vLLM does: GET /v1/models says otherwise."
            )
        return Served(base[0]["id"], int(base[0]["max_model_len"]))

    def rewards(
        self, sequences: Sequence[Sequence[int]], model: str, *, salt: str | None = None, activation: bool = False
    ) -> list[float]:
        """Returns one value for each sequence of token ids; NaN where the server gives none.

        Args:
            sequences: Token ids, special tokens included.
            model: The model's name there.
            salt: Prefixes are shared there only among requests with the same salt.
            activation: Whether the model's activation (a sigmoid, as a rule) is applied; rewards are raw without it.

        Raises:
            UpstreamUnavailableError: The server does not answer now, or takes no requests.
            UpstreamRefusedError: It refuses these sequences, or gives other than one value for each.
        """
        body: dict[str, Any] = {
            "model": model,
            "input": [list(one) for one in sequences],
            "task": "classify",
            "use_activation": activation,
            "add_special_tokens": False,
        }
        if salt is not None:
            body["cache_salt"] = salt
        rows = sorted(self._json("POST", "/pooling", json=body).get("data") or [], key=lambda row: row["index"])
        values = [row["data"] for row in rows]
        if len(values) != len(sequences):
            raise UpstreamRefusedError(f"The upstream gave {len(values)} rows for {len(sequences)} sequences.")
        if any(len(one) != 1 for one in values):
            raise UpstreamRefusedError(
                f"The upstream gave {max(map(len, values))} values for a sequence. It has to serve a classifier with one "
                "label: `--runner pooling --convert classify`, and num_labels = 1."
            )
        return [math.nan if value is None else float(value) for (value,) in values]

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        reply = self._call(method, path, **options)
        try:
            content = reply.json()
        except ValueError as error:
            raise UpstreamRefusedError(f"The upstream's {path} did not answer with JSON.") from error
        return content if isinstance(content, dict) else {}

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        for attempt in range(1, _TRIES + 1):
            try:
                reply = self._http.request(method, path, **options)
                break
            except httpx.TimeoutException as error:
                raise UpstreamUnavailableError(
                    "The upstream did not answer in time.", retry_after=_RETRY_AFTER
                ) from error
            except httpx.TransportError as error:
                if attempt == _TRIES:
                    raise UpstreamUnavailableError(
                        f"The upstream cannot be reached ({type(error).__name__}).", retry_after=_RETRY_AFTER
                    ) from error
        if reply.status_code in _UNAVAILABLE:
            raise UpstreamUnavailableError(
                f"The upstream takes no requests now (status {reply.status_code}).", retry_after=_retry_after(reply)
            )
        if reply.status_code in _KEY_REFUSED:
            raise UpstreamUnavailableError(
                f"The upstream refuses the API key (status {reply.status_code}). Give another --upstream-key-file.",
                retry_after=_LONGEST_RETRY,
            )
        if reply.status_code != httpx.codes.OK:  # its message may repeat the request, so it is left out
            raise UpstreamRefusedError(f"The upstream's {path} answered with status {reply.status_code}.")
        return reply


def read_key(path: Path | None) -> str | None:
    """Reads the API key of an upstream from a file, whose only line it is.

    Raises:
        ConfigError: The file cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"upstream_key_file: {path} cannot be read ({type(error).__name__}).") from error
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(f"upstream_key_file: {path} must hold the key in one line, in ASCII.")
    return key


def _retry_after(reply: httpx.Response) -> int:
    """Returns the seconds that a reply asks to wait, within reason."""
    said = reply.headers.get("Retry-After", "")
    return min(max(int(said), 1), _LONGEST_RETRY) if said.isdecimal() else _RETRY_AFTER
