"""Groups -> steps within a token budget, each one forward pass: one planner for packed and for padded batches.

A packed step costs the tokens of its row, in which a shared prefix is computed once. A padded step costs its longest
response times the number of responses, since padding is computed too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from marginrm.encoding import EncodedGroup
from marginrm.packing import Group, shared_prefix

ForwardPath = Literal["packed", "padded", "one_at_a_time"]


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """A part of one group: members `start` to `stop` (exclusive) of group number `group`."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """The use of a prefix cache by one step, or by several.

    Attributes:
        hits: Groups whose first tokens were kept.
        tokens: Tokens that were not computed, each counted once for its group.
        evicted: Tokens that left the cache to make room.
    """

    hits: int = 0
    tokens: int = 0
    evicted: int = 0

    def __add__(self, other: PrefixUse) -> PrefixUse:
        return PrefixUse(self.hits + other.hits, self.tokens + other.tokens, self.evicted + other.evicted)


@dataclass(slots=True)
class StepResult:
    """The result of `RewardModel.run_step`.

    Attributes:
        rewards: One reward per response, in the groups' shape; NaN and infinity as the model gave them.
        computed: For each group the tokens that were computed for it; a prefix that groups share counts for the first
            of them, and padding for the group that is padded.
        prefixes: What was taken from the prefix cache.
    """

    rewards: list[list[float]]
    computed: list[int]
    prefixes: PrefixUse = field(default_factory=PrefixUse)


def reusable(group: EncodedGroup, shared: int | None = None) -> int:
    """Returns how many first tokens of a group may come from a prefix cache.

    They are common to all members. Tokens that a value is read at are always computed.

    Args:
        group: Encoded responses, at least one.
        shared: Tokens that all members share, if they are counted already (`packing.shared_prefix`).
    """
    end = min(one.tokens - 1 if one.read_at is None else min(one.read_at, default=0) for one in group)
    if len(group) == 1:
        return end
    return min(end, shared_prefix([one.array for one in group]) if shared is None else shared)


def part_room(budget: int, shared: int) -> int:
    """Returns the token limit of a step that starts with a slice of a group larger than the budget.

    The limit is the shared prefix, plus the budget for the members. Up to an eighth more (never more than the prefix) is
    allowed, because one extra slice would compute the prefix again. A prefix longer than the budget is computed once
    for as many tokens of members as it has itself.

    Args:
        budget: Tokens that a step may compute.
        shared: Tokens of the prefix that the group shares, without those that are cached.
    """
    return shared + max(budget + min(budget // 8, shared), shared)


def plan_steps(
    groups: Sequence[Group], budget: int, *, path: ForwardPath, share_prefix: bool, cached: Sequence[int] = ()
) -> Iterator[list[GroupSlice]]:
    """Cuts groups into steps of at most `budget` tokens, one forward pass each.

    Args:
        groups: For each group the token ids of its members.
        budget: Tokens that a step may compute. One response that is longer gets a step of its own.
        path: `packed` keeps the order, and splits a group only if it exceeds a step of its own; each slice then
            computes the prefix again, so a slice may hold as many other tokens as `part_room` says. `padded` sorts all
            responses by length, longest first. `one_at_a_time` gives each response a step.
        share_prefix: Whether a packed row computes the prefix of a group once, as for `plan_row`.
        cached: For each group the first tokens that a packed row leaves out, at most those that its members share; empty
            for none.

    Yields:
        The slices of one step.
    """
    if path == "packed":
        return _packed_steps(groups, budget, cached or [0] * len(groups), share_prefix=share_prefix)
    return _padded_steps([[len(member) for member in group] for group in groups], budget if path == "padded" else 0)


def _packed_steps(
    groups: Sequence[Group], budget: int, cached: Sequence[int], *, share_prefix: bool
) -> Iterator[list[GroupSlice]]:
    step: list[GroupSlice] = []
    used = 0
    for number, group in enumerate(groups):
        shared = max(shared_prefix(group) if share_prefix else 0, cached[number])
        prompt = shared - cached[number]
        whole = sum(len(member) - shared for member in group) + prompt
        if step and used + whole > budget:
            yield step
            step, used = [], 0
        room = budget if whole <= budget else part_room(budget, prompt)
        start, size = 0, prompt
        for index, member in enumerate(group):
            suffix = len(member) - shared
            if index > start and used + size + suffix > room:
                yield [*step, GroupSlice(number, start, index)]
                step, used = [], 0
                start, size = index, prompt
            size += suffix
        step.append(GroupSlice(number, start, len(group)))
        used += size
    if step:
        yield step


def _padded_steps(lengths: Sequence[Sequence[int]], budget: int) -> Iterator[list[GroupSlice]]:
    places = [(number, index) for number, group in enumerate(lengths) for index in range(len(group))]
    places.sort(key=lambda place: -lengths[place[0]][place[1]])
    step: list[GroupSlice] = []
    longest = 0
    for number, index in places:
        if step and longest * (len(step) + 1) > budget:
            yield step
            step = []
        if not step:
            longest = lengths[number][index]
        step.append(GroupSlice(number, index, index + 1))
    if step:
        yield step


def split_by_length(
    step: Sequence[GroupSlice],
    lengths: Sequence[Sequence[int]],
    boundary: int | None,
    *,
    every_length: bool = False,
    alone: bool = False,
) -> Iterator[list[GroupSlice]]:
    """Splits a step so that a forward pass takes sequences of one kind.

    Args:
        step: The slices of one step.
        lengths: For each group the tokens of its members.
        boundary: Sequences up to this length and longer ones are different kinds; None if all are alike.
        every_length: Whether each length beyond the boundary is a kind of its own.
        alone: Whether each response gets a step of its own.

    Yields:
        The slices of one step: those of the shorter responses, then those of the longer ones.
    """
    if alone:
        yield from ([GroupSlice(part.group, at, at + 1)] for part in step for at in range(part.start, part.stop))
        return

    def kind(length: int) -> int:
        if boundary is None or length <= boundary:
            return 0
        return length if every_length else 1

    kinds: dict[int, list[GroupSlice]] = {}
    for part in step:
        start = part.start
        of = lengths[part.group]
        for at in range(part.start, part.stop):
            if at + 1 == part.stop or kind(of[at]) != kind(of[at + 1]):
                kinds.setdefault(kind(of[at]), []).append(GroupSlice(part.group, start, at + 1))
                start = at + 1
    yield from (kinds[one] for one in sorted(kinds))
