"""Groups of token ids -> one row without padding, in which what a group's members share appears once.

A plan is a forest of *runs*. A run is a stretch of consecutive tokens in the row; its tokens attend to each other and
to the runs above it (parent, grandparent, ...). A group whose members start alike becomes a run for their longest
common prefix and one child run per member for the rest; anything else is a run without a parent. The prefix is found
on token ids, so it does not matter where a tokenizer puts its boundaries.

Everything here is pure Python on integers; `rows` turns a plan into tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TokenIds = tuple[int, ...]
Group = Sequence[TokenIds]
ROOT = -1


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of the row that attend to each other and to their ancestors.

    Attributes:
        start: Row index of the first token.
        length: Number of tokens, at least 1.
        parent: Index of the run that comes before it in the sequence, or `ROOT`.
        offset: Position id of the first token, which is the number of tokens in all ancestors.
    """

    start: int
    length: int
    parent: int
    offset: int


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """How groups lie in one row.

    Attributes:
        ids: Token ids of the row.
        position_ids: Position of each token in the sequence it came from, counted from 0.
        runs: The stretches of the row, parents before children.
        leaves: For each response, in the order given, the index of the run that holds its end.
    """

    ids: list[int]
    position_ids: list[int]
    runs: tuple[Run, ...]
    leaves: tuple[int, ...]

    @property
    def last(self) -> list[int]:
        """Row index of each response's last token."""
        return [self.runs[leaf].start + self.runs[leaf].length - 1 for leaf in self.leaves]

    def ancestors(self, run: int) -> list[int]:
        """Returns the runs that a run continues, first to last."""
        found: list[int] = []
        parent = self.runs[run].parent
        while parent != ROOT:
            found.append(parent)
            parent = self.runs[parent].parent
        return found[::-1]


def shared_prefix(group: Group) -> int:
    """Returns how many leading tokens all members share, leaving each member at least one token of its own."""
    if len(group) < 2:
        return 0
    low, high = min(group), max(group)  # all members lie between the two, so they share what these two share
    limit = min(len(member) for member in group) - 1
    for index in range(limit):
        if low[index] != high[index]:
            return index
    return limit


def cost(group: Group, *, share_prefix: bool) -> int:
    """Returns how many tokens a group puts into a row."""
    shared = shared_prefix(group) if share_prefix else 0
    return sum(len(member) for member in group) - shared * max(len(group) - 1, 0)


def plan_row(groups: Sequence[Group], *, share_prefix: bool) -> PackingPlan:
    """Lays groups end to end in one row.

    Args:
        groups: For each group the token ids of its members, each with at least one token.
        share_prefix: Whether members may attend to one copy of what they share (decoders) or not (encoders).

    Returns:
        The plan; its leaves follow the order of the groups and of their members.
    """
    ids: list[int] = []
    position_ids: list[int] = []
    runs: list[Run] = []
    leaves: list[int] = []

    def append(tokens: Sequence[int], parent: int, offset: int) -> int:
        runs.append(Run(len(ids), len(tokens), parent, offset))
        ids.extend(tokens)
        position_ids.extend(range(offset, offset + len(tokens)))
        return len(runs) - 1

    for group in groups:
        shared = shared_prefix(group) if share_prefix else 0
        parent = append(group[0][:shared], ROOT, 0) if shared else ROOT
        leaves.extend(append(member[shared:], parent, shared) for member in group)
    return PackingPlan(ids, position_ids, tuple(runs), tuple(leaves))


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of one group: members `start` to `stop` (exclusive) of group number `group`."""

    group: int
    start: int
    stop: int


def plan_steps(groups: Sequence[Group], budget: int, *, share_prefix: bool) -> Iterator[list[Slice]]:
    """Cuts groups into steps of at most `budget` tokens, one forward pass each, in the order given.

    A group is split only where it does not fit into a step of its own; each part then computes the prefix again. A
    single sequence longer than the budget gets a step to itself.

    Args:
        groups: For each group the token ids of its members.
        budget: The most tokens a step may compute.
        share_prefix: As for `plan_row`.

    Yields:
        The slices of one step.
    """
    step: list[Slice] = []
    used = 0
    for number, group in enumerate(groups):
        shared = shared_prefix(group) if share_prefix else 0
        whole = sum(len(member) for member in group) - shared * max(len(group) - 1, 0)
        if step and used + whole > budget:
            yield step
            step, used = [], 0
        start, size = 0, shared
        for index, member in enumerate(group):
            own = len(member) - shared
            if index > start and used + size + own > budget:
                yield [*step, Slice(number, start, index)]
                step, used = [], 0
                start, size = index, shared
            size += own
        step.append(Slice(number, start, len(group)))
        used += size
    if step:
        yield step
