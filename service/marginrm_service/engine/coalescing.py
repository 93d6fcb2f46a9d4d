"""Nothing is computed twice: rewards that are kept, and those that are being computed for somebody else, are taken.

A request looks each of its distinct responses up, once. What is kept it has at once. What another request is computing
it waits for, if that one has no more to compute than itself and is not of a lower class: so nobody waits longer for
another than it would for its own turn. The rest it *claims*, and computes; equal responses wait for it meanwhile.

Who waited in vain, because the other request ended without a reward, computes it itself and waits for nobody again.
So an answer may come at another's cost, but another's error, deadline or end is never one's own; and claims are
computed before anything is waited for, so two requests cannot wait for each other.

Belongs to the event loop: there are no locks, and looking up and claiming are one piece.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from marginrm.errors import MarginRMError
from marginrm_service.engine.job import Job, Outcome
from marginrm_service.engine.reward_cache import RewardCache

Compute = Callable[[Job], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Reused:
    """How many responses of a job got their outcomes where.

    Attributes:
        stored: From the cache.
        in_flight: From another request or from an equal response of the same one, computed at that time.
        computed: By the model.
    """

    stored: int
    in_flight: int
    computed: int


@dataclass(eq=False, slots=True)
class _Request:
    """A job that is being run.

    Attributes:
        job: All that was asked.
        rank: Its class, and the tokens that it has to compute; who has a lower one waits for nobody above.
        claims: Keys of what it computes, with those that wait for them.
        awaited: Keys that it waits for, and who computes them.
        vain: Keys that it waited for in vain.
        given: Resolved when nothing is awaited any more.
    """

    job: Job
    rank: tuple[bool, int]
    claims: dict[bytes, dict[_Request, None]] = field(default_factory=dict)
    awaited: dict[bytes, _Request] = field(default_factory=dict)
    vain: list[bytes] = field(default_factory=list)
    given: asyncio.Future[None] | None = None

    def take(self, key: bytes, outcome: Outcome) -> None:
        """Puts an outcome wherever it belongs in the job."""
        for group, member in self.job.places[key]:
            self.job.record(group, member, [outcome])

    def give(self, key: bytes, reward: float | None) -> None:
        """Ends the waiting for a key, with a reward or in vain."""
        del self.awaited[key]
        if reward is None:
            self.vain.append(key)
        else:
            self.take(key, reward)
        if self.given and not self.awaited and not self.given.done():
            self.given.set_result(None)

    async def all_given(self) -> None:
        """Waits until nothing is awaited."""
        if self.awaited:
            self.given = asyncio.get_running_loop().create_future()
            await self.given


class Reuse:
    """Runs jobs, apart from what need not be computed.

    Args:
        cache: Where rewards are kept.
    """

    def __init__(self, cache: RewardCache) -> None:
        self._cache = cache
        self._owners: dict[bytes, _Request] = {}

    async def run(self, job: Job, compute: Compute) -> Reused:
        """Waits until every response of a job has an outcome.

        Args:
            job: What is asked, with `places`.
            compute: Runs a job on the model. Called with the part that is left to compute, which may be empty, and once
                more if something was waited for in vain.

        Raises:
            Exception: Whatever `compute` raises.
        """
        job.queued_at = perf_counter()
        request = _Request(job, (job.bulk, job.cost))
        try:
            left, stored = self._look_up(request)
            await self._compute(request, left, compute)
            await request.all_given()
            if request.vain:
                await self._compute(request, request.vain, compute)
        finally:
            self._leave(request)
        responses, computed = sum(map(len, job.groups)), len(left) + len(request.vain)
        return Reused(stored, responses - stored - computed, computed)

    def _look_up(self, request: _Request) -> tuple[list[bytes], int]:
        """Returns the keys that are left to compute, and how many responses had a reward that was kept."""
        left: list[bytes] = []
        stored = 0
        for key, places in request.job.places.items():
            reward, owner = self._cache.get(key), self._owners.get(key)
            if reward is not None:
                request.take(key, reward)
                stored += len(places)
            elif owner and owner.rank <= request.rank:
                owner.claims[key][request] = None
                request.awaited[key] = owner
            else:
                left.append(key)
        return left, stored

    async def _compute(self, request: _Request, keys: Collection[bytes], compute: Compute) -> None:
        """Claims keys and computes them; members of a group stay together."""
        members: dict[int, list[int]] = defaultdict(list)
        rows: dict[int, list[bytes]] = defaultdict(list)
        for key in keys:
            group, member = request.job.places[key][0]
            members[group].append(member)
            rows[group].append(key)
            self._owners[key] = request
            request.claims[key] = {}
        part = request.job.part(members)
        part.on_group = partial(self._computed, request, part, list(rows.values()))
        request.rank = (part.bulk, part.cost)
        await compute(part)
        part.on_group = None  # which refers to the part: a circle would keep the texts until it is looked for
        request.job.absorb(part)

    def _computed(self, request: _Request, part: Job, rows: Sequence[Sequence[bytes]], group: int) -> None:
        """Hands on the outcomes of a group; also when nobody waits for that part any more, as they may be asked again."""
        for key, outcome in zip(rows[group], part.outcomes[group], strict=True):
            assert outcome is not None  # the group is complete
            request.take(key, outcome)
            reward = None if isinstance(outcome, MarginRMError) else outcome
            if reward is not None:
                self._cache.put(key, reward)
            self._end_claim(request, key, reward)

    def _end_claim(self, request: _Request, key: bytes, reward: float | None) -> None:
        if self._owners.get(key) is request:  # or one of a lower rank has claimed it since
            del self._owners[key]
        for other in request.claims.pop(key, ()):
            other.give(key, reward)

    def _leave(self, request: _Request) -> None:
        """Ends what a request waits for and what waits for it. Of no effect when all has come."""
        for key, owner in request.awaited.items():
            del owner.claims[key][request]
        request.awaited.clear()
        for key in list(request.claims):
            self._end_claim(request, key, None)
