"""The server's admin routes, as far as the soak uses them: the one place that knows their shape."""

from __future__ import annotations

from pathlib import Path

import httpx

_SWAP = "/admin/models/{name}"


def arguments(work: Path) -> list[str]:
    """Returns the arguments with which `marginrm serve` offers these routes."""
    return []


async def offered(http: httpx.AsyncClient) -> bool:
    """Whether the server can swap models."""
    return _SWAP in (await http.get("/openapi.json")).json()["paths"]


async def swap(http: httpx.AsyncClient, path: Path) -> None:
    """Puts another checkpoint in the place of the default model."""
    reply = await http.put(_SWAP.format(name="default"), json={"path": str(path)})
    reply.raise_for_status()
