"""The server's admin routes, as far as the soak uses them."""

from __future__ import annotations

from pathlib import Path

import httpx

from marginrm_service.keys import add_key


class Admin:
    """A holder of an admin key.

    Args:
        work: Where the key file is written, anew.

    Attributes:
        arguments: With which `marginrm serve` knows the key.
    """

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        file = work / "admin-keys"
        file.unlink(missing_ok=True)
        self._headers = {"Authorization": f"Bearer {add_key(file, 'soak')}"}
        self.arguments = ["--admin-key-file", str(file)]

    async def swap(self, http: httpx.AsyncClient, path: Path) -> None:
        """Puts another checkpoint in the place of the default model."""
        body = {"name": "default", "path": str(path)}
        (await http.post("/admin/models", json=body, headers=self._headers)).raise_for_status()
