"""Decompresses request bodies sent with `Content-Encoding: gzip`."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm_service.api.errors import BodyError, body_too_large, error_response

_GZIP = {"gzip", "x-gzip"}  # RFC 9110, section 8.4.1.3: equivalent
_GZIP_FORMAT = 16 + zlib.MAX_WBITS  # zlib's name for it


class ContentEncoding:
    """Decompresses gzip, and refuses other encodings with 415.

    Args:
        app: The application.
        max_bytes: The largest body after decompression.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        encoding = Headers(scope=scope).get("content-encoding", "identity") if scope["type"] == "http" else "identity"
        encoding = encoding.strip().lower()
        if encoding == "identity":
            await self._app(scope, receive, send)
        elif encoding in _GZIP:
            await self._app(scope, _decompressed(receive, self._max_bytes), send)
        else:
            message = "The body has a content encoding that this server does not take. Send it as gzip or uncompressed."
            headers = {"Accept-Encoding": "gzip, identity"}  # RFC 9110, section 12.5.3
            await error_response(415, "unsupported_encoding", message, headers=headers)(scope, receive, send)


def _decompressed(receive: Receive, max_bytes: int) -> Receive:
    """Returns a `receive` that gives the decompressed body."""
    decompressor = _Gzip(max_bytes)

    async def receive_decompressed() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            more = message.get("more_body", False)
            body = decompressor.feed(message.get("body", b""), last=not more)
            message = {"type": "http.request", "body": body, "more_body": more}
        return message

    return receive_decompressed


class _Gzip:
    """Decompresses a gzip stream of one or more members, piece by piece."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._room = max_bytes
        self._member = zlib.decompressobj(_GZIP_FORMAT)

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Returns the decompressed bytes of a piece.

        Raises:
            BodyError: The stream is damaged, ends too early, or holds more than the limit.
        """
        pieces = []
        try:
            while data:
                if self._member.eof:
                    self._member = zlib.decompressobj(_GZIP_FORMAT)
                pieces.append(self._member.decompress(data, self._room + 1))
                self._room -= len(pieces[-1])
                if self._room < 0:
                    raise body_too_large(self._max_bytes)
                data = self._member.unused_data
        except zlib.error as error:
            raise BodyError(400, "malformed_gzip", "The body is not valid gzip.") from error
        if last and not self._member.eof:
            raise BodyError(400, "malformed_gzip", "The body ends in the middle of its gzip stream.")
        return b"".join(pieces)
