"""The encoded work of one request: what is left to compute, its outcomes, and when each stage happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from marginrm.encoding import EncodedGroup
from marginrm.errors import MarginRMError
from marginrm.packing import shared_prefix
from marginrm.steps import reusable

Outcome = float | MarginRMError
CachedTokens = Callable[[NDArray[np.int32], str | None], int]  # `RewardModel.cached_tokens`


@dataclass(slots=True)
class GroupPlan:
    """The sizes by which a group is scheduled.

    Attributes:
        lengths: Tokens of each member.
        shared: Leading tokens that all members share and that are computed once.
        reusable: Leading tokens that may come from a prefix cache.
        cached: Those that are in it, when it was looked up last.
    """

    lengths: list[int]
    shared: int
    reusable: int = 0
    cached: int = 0

    @property
    def common(self) -> int:
        """Leading tokens that are not computed for each member."""
        return max(self.shared, self.cached)

    @property
    def prompt(self) -> int:
        """Tokens that are computed once for all members of a step."""
        return self.common - self.cached

    @property
    def cost(self) -> int:
        """Tokens to compute for the whole group in one step."""
        return sum(self.lengths) - self.common * len(self.lengths) + self.prompt

    @classmethod
    def of(cls, group: EncodedGroup, *, share_prefix: bool) -> GroupPlan:
        """Measures a group that is not empty. Takes time on large ones: call it off the event loop."""
        shared = shared_prefix([member.array for member in group]) if share_prefix else 0
        return cls([member.tokens for member in group], shared, reusable(group, shared))

    def subset(self, members: Sequence[int]) -> GroupPlan:
        """Returns the plan of some members, with the shared prefix of the whole group.

        Some members may share more than the group does. Looking for it takes time, so it is not done here.
        """
        shared = self.shared if len(members) > 1 else 0
        return GroupPlan([self.lengths[member] for member in members], shared, self.reusable, self.cached)


@dataclass(eq=False, slots=True)
class Job:
    """The encoded groups of one request.

    The worker thread moves the cursor (`group`, `member`) under the queue's lock. The fields from `outcomes` on belong
    to the event loop, except `cancelled`, which the loop sets and the worker reads.

    Attributes:
        groups: Encoded responses, those with a common prompt together; no group is empty.
        plans: One for each group.
        bulk: It uses the capacity that interactive work leaves.
        tenant: The name under which prefixes are read and kept; None neither reads nor keeps.
        group: Index of the next group to schedule.
        member: Index of the first member of that group that is not yet scheduled.
        outcomes: For each response its reward, or the error in its place; None while it is unknown.
        missing: For each group the number of responses without an outcome.
        remaining: The sum of `missing`.
        computed: Tokens that the model computed for this job.
        cancelled: Its request has ended, so the queue drops it.
        on_computed: Called with the number of tokens after each step that held a part of this job.
        on_group: Called with the index of a group when its last outcome is known.
        done: Resolved when no response is left, or failed with the reason why none will come.
        queued_at: When it was queued, in seconds of `perf_counter`.
        started_at: When its first slice went into a step.
        forward_seconds: Time of all steps that held a part of it.
    """

    groups: Sequence[EncodedGroup]
    plans: list[GroupPlan]
    bulk: bool = False
    tenant: str | None = None
    group: int = 0
    member: int = 0
    outcomes: list[list[Outcome | None]] = field(init=False)
    missing: list[int] = field(init=False)
    remaining: int = field(init=False)
    computed: int = 0
    cancelled: bool = False
    on_computed: Callable[[int], None] | None = None
    on_group: Callable[[int], None] | None = None
    done: asyncio.Future[None] | None = None
    queued_at: float = field(default_factory=perf_counter)
    started_at: float | None = None
    forward_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.outcomes = [[None] * len(group) for group in self.groups]
        self.missing = [len(group) for group in self.groups]
        self.remaining = sum(self.missing)

    @classmethod
    def of(cls, groups: Sequence[EncodedGroup], *, share_prefix: bool, tenant: str | None = None) -> Job:
        """Makes a job of groups that are not empty. Takes time on large ones: call it off the event loop."""
        return cls(groups, [GroupPlan.of(group, share_prefix=share_prefix) for group in groups], tenant=tenant)

    def look_up(self, group: int, cached_tokens: CachedTokens) -> None:
        """Brings the plan of a group up to date with a prefix cache."""
        plan = self.plans[group]
        plan.cached = cached_tokens(self.groups[group][0].array[: plan.reusable], self.tenant)

    def subset(self, members: Mapping[int, Sequence[int]]) -> Job:
        """Returns a job of some members of some groups of this one.

        Args:
            members: Indices of members by the index of their group.
        """
        groups = [[self.groups[group][member] for member in chosen] for group, chosen in members.items()]
        plans = [self.plans[group].subset(chosen) for group, chosen in members.items()]
        return Job(groups, plans, bulk=self.bulk, tenant=self.tenant, on_computed=self.on_computed)

    def add_cost_of(self, subset: Job) -> None:
        """Adds the tokens and the time that a subset of this job has cost."""
        self.computed += subset.computed
        self.forward_seconds += subset.forward_seconds
        if self.started_at is None:
            self.started_at = subset.started_at

    @property
    def cost(self) -> int:
        """Tokens to compute for the whole job if no group has to be cut."""
        return sum(plan.cost for plan in self.plans)

    @property
    def fully_scheduled(self) -> bool:
        """Whether every response has gone into a step."""
        return self.group >= len(self.plans)

    def advance(self, members: int) -> None:
        """Moves the cursor over the next members of the current group."""
        self.member += members
        if self.member >= len(self.plans[self.group].lengths):
            self.group, self.member = self.group + 1, 0

    def record(self, group: int, start: int, outcomes: Sequence[Outcome]) -> None:
        """Stores the outcomes of consecutive members of one group."""
        self.outcomes[group][start : start + len(outcomes)] = outcomes
        self.missing[group] -= len(outcomes)
        self.remaining -= len(outcomes)
        if self.on_group and not self.missing[group]:
            self.on_group(group)
