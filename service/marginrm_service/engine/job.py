"""One request's work on its way through the engine: what is left to compute, what came out, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from marginrm.encoding import EncodedResponse
from marginrm.errors import MarginRMError
from marginrm.packing import shared_prefix

Group = Sequence[EncodedResponse]
Outcome = float | MarginRMError
Place = tuple[int, int]  # number of the group, and of the member in it


@dataclass(slots=True)
class GroupPlan:
    """What batching needs to know of one group.

    Attributes:
        lengths: Tokens of each member.
        shared: Leading tokens that all members share and that are computed once.
        cost: Tokens to compute for the whole group in one step.
    """

    lengths: list[int]
    shared: int
    cost: int

    @classmethod
    def of(cls, group: Group, *, share_prefix: bool) -> GroupPlan:
        """Measures a group. Takes time on large ones: call it off the event loop."""
        lengths = [len(member.ids) for member in group]
        shared = shared_prefix([member.array for member in group]) if share_prefix else 0
        return cls(lengths, shared, cost=sum(lengths) - shared * (len(lengths) - 1))

    def part(self, members: Sequence[int]) -> GroupPlan:
        """Returns the plan of some members. What they share beyond the whole group is not looked for: that takes time."""
        lengths = [self.lengths[member] for member in members]
        shared = self.shared if len(members) > 1 else 0
        return GroupPlan(lengths, shared, sum(lengths) - shared * (len(lengths) - 1))


@dataclass(eq=False, slots=True)
class Job:
    """The encoded groups of one request.

    The worker thread moves the cursor (`group`, `member`) under the queue's lock; everything below `outcomes` belongs
    to the event loop, apart from `abandoned`, which the loop sets and the worker reads.

    Attributes:
        groups: Encoded responses, those with a common prompt together; no group is empty.
        plans: One for each group.
        bulk: Whether it takes the room that interactive work leaves.
        places: Where each distinct response stands, by `reward_cache.key_of`; empty if nothing is to be reused.
        group: The group to be taken next.
        member: The first member of that group that was not taken yet.
        outcomes: One per response: its reward, or the error that took its place.
        missing: For each group how many of its responses have no outcome.
        remaining: Their sum.
        computed: Tokens that the model computed for this job.
        abandoned: Nobody waits for this any more: the queue drops it.
        on_computed: Called with the number of tokens after each step that held a part of this job.
        on_group: Called with the number of a group when its last outcome has come.
        done: Resolved when no response is left, or failed with the reason why none will come.
        queued_at: When it was queued, in seconds of `perf_counter`.
        started_at: When its first part went into a step.
        forward_seconds: Time of all the steps that held a part of it.
    """

    groups: Sequence[Group]
    plans: list[GroupPlan]
    bulk: bool = False
    places: Mapping[bytes, Sequence[Place]] = field(default_factory=dict)
    group: int = 0
    member: int = 0
    outcomes: list[list[Outcome | None]] = field(init=False)
    missing: list[int] = field(init=False)
    remaining: int = field(init=False)
    computed: int = 0
    abandoned: bool = False
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
    def of(cls, groups: Sequence[Group], *, share_prefix: bool) -> Job:
        """Makes a job of groups that are not empty. Takes time on large ones: call it off the event loop."""
        return cls(groups, [GroupPlan.of(group, share_prefix=share_prefix) for group in groups])

    def part(self, members: Mapping[int, Sequence[int]]) -> Job:
        """Makes a job of some members of some groups, given by their numbers, for the same request."""
        groups = [[self.groups[group][member] for member in chosen] for group, chosen in members.items()]
        plans = [self.plans[group].part(chosen) for group, chosen in members.items()]
        return Job(groups, plans, bulk=self.bulk, on_computed=self.on_computed)

    def absorb(self, part: Job) -> None:
        """Adds what a part of it has cost."""
        self.computed += part.computed
        self.forward_seconds += part.forward_seconds
        if self.started_at is None:
            self.started_at = part.started_at

    @property
    def cost(self) -> int:
        """Tokens to compute for the whole job, if no group has to be cut."""
        return sum(plan.cost for plan in self.plans)

    @property
    def taken(self) -> bool:
        """Whether every response has gone into a step."""
        return self.group >= len(self.plans)

    def advance(self, members: int) -> None:
        """Moves the cursor over the next members of the current group."""
        self.member += members
        if self.member >= len(self.plans[self.group].lengths):
            self.group, self.member = self.group + 1, 0

    def record(self, group: int, start: int, outcomes: Sequence[Outcome]) -> None:
        """Keeps the outcomes of consecutive members of one group."""
        self.outcomes[group][start : start + len(outcomes)] = outcomes
        self.missing[group] -= len(outcomes)
        self.remaining -= len(outcomes)
        if self.on_group and not self.missing[group]:
            self.on_group(group)
