"""marginrm over HTTP: `marginrm serve` in a process of its own, and clients in this one."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.server import ServerProcess, marginrm_command
from benchmarks.harness.texts import Sample
from benchmarks.throughput.scorers.classify_client import REPLY_SECONDS, ClassifyClient, Requests, send_all
from marginrm.client import AsyncRewardClient

_COMPUTED = "marginrm_tokens_computed_total"
_COMPILING = "compiling its layers in the background"
_COMPILED = ("layers compiled", "layers not compiled", "compiling failed")
_COMPILE_SECONDS = 300.0


class OverHttp:
    """One group in a request, by marginrm's client; or one response in a request to `/classify`.

    Args:
        folder: The model.
        dtype: Dtype of the backbone.
        device: `cpu` or `cuda`.
        arguments: More arguments of `marginrm serve`.
    """

    def __init__(
        self, folder: Path, *, dtype: str = "auto", device: str = "cpu", arguments: tuple[str, ...] = ()
    ) -> None:
        given = ["--model", str(folder), "--dtype", dtype, "--device", device, *arguments]
        given += ["--reward-cache-mib", "0"]  # warm-up and measurement send some of the same texts
        with ExitStack() as resources:
            logs = resources.enter_context(TemporaryDirectory(prefix="marginrm-serve-"))
            server = ServerProcess(marginrm_command(*given), Path(logs, "log"), ready="/readyz")
            self._server = resources.enter_context(server)
            self._await_compilation()
            self._resources = resources.pop_all()  # held until this process ends, and with it its children
        self._loop = asyncio.new_event_loop()
        self._client = AsyncRewardClient(server.url, timeout=REPLY_SECONDS)
        self._classify = ClassifyClient(server.url, folder)
        self._computed_before = 0.0
        self.detail: dict[str, Any] = {"arguments": given[2:]}

    def _await_compilation(self) -> None:
        """Waits until layers that the server compiles in the background are compiled, as they are in a server's life.

        Raises:
            RuntimeError: That takes too long.
        """
        time.sleep(1)  # compilation begins when the server is ready
        deadline = time.monotonic() + _COMPILE_SECONDS
        while _COMPILING in (log := self._server.log) and not any(words in log for words in _COMPILED):
            if time.monotonic() > deadline:
                raise RuntimeError(f"The server is still compiling after {_COMPILE_SECONDS:.0f} s:\n{log[-3000:]}")
            time.sleep(1)

    @property
    def computed(self) -> int | None:
        """Tokens that the server has computed since `prepare`."""
        return round(self._server.metric(_COMPUTED) - self._computed_before)

    def prepare(self, sample: Sample) -> Sample | Requests:
        """Returns the sample for marginrm's client, which builds requests itself, or bodies for `/classify`."""
        self._computed_before = self._server.metric(_COMPUTED)
        return self._classify.requests(sample) if sample.classify else sample

    def run(self, work: Sample | Requests) -> list[float]:
        """Sends all requests and returns the rewards."""
        send = self._classify.rewards(work) if isinstance(work, Requests) else self._rewards(work)
        return self._loop.run_until_complete(send)

    async def _rewards(self, sample: Sample) -> list[float]:
        rewards = await send_all(
            [[group] for group in sample.groups],
            lambda group: self._client.score(group.prompt, group.responses),
            sample.clients,
        )
        return [reward for group in rewards for reward in group]


load = OverHttp
