"""Request coalescing: a response that is cached, or already being computed for another request, is not computed again.

A request looks up each of its distinct responses once. Cached rewards are taken at once. A response that another request
is computing is awaited, if that request has no more left to compute and is not of a lower class; so a request never
waits longer for another one than for its own turn. The request *owns* the keys of the other responses and computes
them; equal responses of other requests wait for it meanwhile.

If the other request ends without a reward, the waiting request computes the response itself and does not wait a second
time. So a reward may come from another request, but an error, a deadline or a disconnect never does. Owned keys are
computed before anything is awaited, so two requests cannot wait for each other.

Belongs to the event loop: there are no locks, because lookup and ownership are one uninterrupted step.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Self

from marginrm.errors import MarginRMError
from marginrm_service.engine.job import Job, Outcome
from marginrm_service.engine.request import Reuse
from marginrm_service.engine.reward_cache import PositionsByKey, RewardCache


class Coalescer:
    """The rewards of one model that are cached or being computed.

    Args:
        cache: Rewards of earlier requests.
    """

    def __init__(self, cache: RewardCache) -> None:
        self.cache = cache
        self._owners: dict[bytes, SharedWork] = {}

    @property
    def keys_in_flight(self) -> int:
        """Number of distinct responses that requests are computing."""
        return len(self._owners)

    def open(self, job: Job, positions: PositionsByKey) -> SharedWork:
        """Returns the work of a job as a context manager, whose parts are to be computed.

        Args:
            job: A job of which nothing was computed yet.
            positions: Positions of each distinct response, by `reward_cache.key_of`.
        """
        return SharedWork(self, job, positions)

    def reward_or_owner(self, key: bytes) -> float | SharedWork | None:
        """Returns the cached reward of a key, or the work that computes it."""
        reward = self.cache.get(key)
        return self._owners.get(key) if reward is None else reward

    def own(self, key: bytes, owner: SharedWork) -> None:
        """Makes a key the work of `owner`. Only work of a lower priority may have owned it before."""
        self._owners[key] = owner

    def disown(self, key: bytes, owner: SharedWork) -> None:
        """Ends ownership, unless work of a higher priority has taken the key over."""
        if self._owners.get(key) is owner:
            del self._owners[key]


class SharedWork:
    """A job while it is computed, with what it takes from other requests and what they take from it.

    Enter it, then compute every job that `next_part` returns:

    ```
    with coalescer.open(job, positions) as shared:
        while part := await shared.next_part():
            await engine.run(part)
    ```

    Attributes:
        priority: Class and tokens left to compute. Work waits only for work of a lower or equal value.
        owned_keys: Keys that it computes, each with the work that waits for it, in the order of arrival.
        awaited: Keys that it waits for, with the work that computes them.
        failed_keys: Keys that it waited for and that were not computed.
    """

    def __init__(self, coalescer: Coalescer, job: Job, positions: PositionsByKey) -> None:
        self.priority = (job.bulk, job.cost)
        self._coalescer = coalescer
        self._job = job
        self._positions = positions
        self.owned_keys: dict[bytes, dict[SharedWork, None]] = {}
        self.awaited: dict[bytes, SharedWork] = {}
        self.failed_keys: list[bytes] = []
        self._received: asyncio.Future[None] | None = None  # resolved when nothing is awaited
        self._part: Job | None = None
        self._stored = self._computed = 0

    @property
    def reuse(self) -> Reuse:
        """Number of responses by source, once there is no further part."""
        responses = sum(map(len, self._job.groups))
        return Reuse(self._stored, responses - self._stored - self._computed, self._computed)

    def __enter__(self) -> Self:
        self._job.queued_at = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops waiting for others, and lets those that wait for this work compute for themselves."""
        for key, owner in self.awaited.items():
            del owner.owned_keys[key][self]
        self.awaited.clear()
        for key in list(self.owned_keys):
            self._settle(key, None)

    async def next_part(self) -> Job | None:
        """Returns a job of the responses to compute now, and None when every response has an outcome.

        The first part may be empty. A second one, if any, holds what other requests did not compute after all.
        """
        if self._part is None:
            return self._own(self._look_up())
        self._job.add_cost_of(self._part)
        self._part.on_group = None  # it refers to the part; without the cycle the texts are freed at once
        if self.awaited:
            self._received = asyncio.get_running_loop().create_future()
            await self._received
        failed, self.failed_keys = self.failed_keys, []
        return self._own(failed) if failed else None

    def _look_up(self) -> list[bytes]:
        """Takes what is cached, notes what is to be awaited, and returns the keys that are left to compute."""
        unknown: list[bytes] = []
        for key, positions in self._positions.items():
            found = self._coalescer.reward_or_owner(key)
            if isinstance(found, float):
                self.record(key, found)
                self._stored += len(positions)
            elif found and found.priority <= self.priority:
                found.owned_keys[key][self] = None
                self.awaited[key] = found
            else:
                unknown.append(key)
        return unknown

    def _own(self, keys: Collection[bytes]) -> Job:
        """Takes ownership of keys and returns a job of them, in which members of a group stay together."""
        members: dict[int, list[int]] = defaultdict(list)
        keys_of_groups: dict[int, list[bytes]] = defaultdict(list)
        for key in keys:
            group, member = self._positions[key][0]
            members[group].append(member)
            keys_of_groups[group].append(key)
            self._coalescer.own(key, self)
            self.owned_keys[key] = {}
        self._computed += len(keys)
        self._part = part = self._job.subset(members)
        part.on_group = partial(self._publish, part, list(keys_of_groups.values()))
        self.priority = (part.bulk, part.cost)
        return part

    def _publish(self, part: Job, keys_of_groups: Sequence[Sequence[bytes]], group: int) -> None:
        """Passes on the outcomes of a computed group, even if this request has ended meanwhile."""
        for key, outcome in zip(keys_of_groups[group], part.outcomes[group], strict=True):
            assert outcome is not None  # the group is complete
            self.record(key, outcome)
            reward = None if isinstance(outcome, MarginRMError) else outcome
            if reward is not None:
                self._coalescer.cache.put(key, reward)
            self._settle(key, reward)

    def _settle(self, key: bytes, reward: float | None) -> None:
        """Ends ownership of a key, and delivers its reward, or None, to the work that waits for it."""
        self._coalescer.disown(key, self)
        for other in self.owned_keys.pop(key, ()):
            other.deliver(key, reward)

    def deliver(self, key: bytes, reward: float | None) -> None:
        """Receives an awaited reward; None if the owner ended without one."""
        del self.awaited[key]
        if reward is None:
            self.failed_keys.append(key)
        else:
            self.record(key, reward)
        if self._received and not self.awaited and not self._received.done():
            self._received.set_result(None)

    def record(self, key: bytes, outcome: Outcome) -> None:
        """Stores an outcome at every position of its response."""
        for group, member in self._positions[key]:
            self._job.record(group, member, [outcome])
