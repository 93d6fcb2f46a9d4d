"""Groups of token ids -> one row without padding, in which what a group's members share appears once.

A plan is a forest of *runs*. A run is a stretch of consecutive tokens in the row; its tokens attend to each other and
to the runs above it (parent, grandparent, ...). A group whose members start alike becomes a run for their longest
common prefix and one child run per member for the rest; groups whose prefixes start alike (one system prompt, one
prompt in many requests, whole texts of candidates) branch from one copy of that, as in a radix tree. Prefixes are
found on token ids, so it does not matter where a tokenizer puts its boundaries.

Everything here is pure Python on integers; `rows` turns a plan into tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

TokenIds = tuple[int, ...]
Group = Sequence[TokenIds]
ROOT = -1
# Groups share what they start with from so many tokens on: a chat template's first tokens are not worth a run.
SHARE_FROM = 32


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
        costs: Tokens that each group put into the row; what several share is the first one's.
    """

    ids: list[int]
    position_ids: list[int]
    runs: tuple[Run, ...]
    leaves: tuple[int, ...]
    costs: tuple[int, ...]

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
    # All members lie between the least and the greatest, so they share what these two share.
    return min(_common(min(group), max(group)), min(len(member) for member in group) - 1)


def cost(group: Group, *, share_prefix: bool) -> int:
    """Returns how many tokens a group puts into a row of its own."""
    shared = shared_prefix(group) if share_prefix else 0
    return sum(len(member) for member in group) - shared * max(len(group) - 1, 0)


def plan_row(groups: Sequence[Group], *, share_prefix: bool, share_from: int = SHARE_FROM) -> PackingPlan:
    """Lays groups end to end in one row.

    Args:
        groups: For each group the token ids of its members, each with at least one token.
        share_prefix: Whether members may attend to one copy of what they share (decoders) or not (encoders).
        share_from: Groups that start alike share those tokens too when they are at least so many.

    Returns:
        The plan; its leaves follow the order of the groups and of their members.
    """
    row = _Row(groups)
    if share_prefix:
        heads = [tuple(group[0][: shared_prefix(group) if len(group) > 1 else -1]) for group in groups]
        row.branch(list(range(len(groups))), heads, share_from, ROOT, 0)
    else:
        for number in range(len(groups)):
            row.lay(number, 0, ROOT, 0)
    leaves = tuple(leaf for found in row.leaves for leaf in found)
    return PackingPlan(row.ids, row.position_ids, tuple(row.runs), leaves, tuple(row.costs))


class _Row:
    """A row while groups are laid into it."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.runs: list[Run] = []
        self.leaves: list[list[int]] = [[] for _ in groups]
        self.costs = [0] * len(groups)
        self._groups = groups

    def branch(self, numbers: list[int], heads: list[TokenIds], share_from: int, parent: int, depth: int) -> None:
        """Lays groups whose heads agree on `depth` tokens, which `parent` ends.

        Those that agree on `share_from` more tokens get one run for all that they share, and branch from there. What
        came first lies first.
        """
        near: dict[TokenIds, list[int]] = defaultdict(list)
        for number in numbers:
            head = heads[number][depth : depth + share_from]
            near[head if len(head) == share_from else (-1, number)].append(number)  # too short a head shares nothing
        for alike in near.values():
            if len(alike) == 1:
                self.lay(alike[0], len(heads[alike[0]]), parent, depth)
                continue
            common = [heads[number] for number in alike]
            deeper = _common(min(common), max(common))
            run = self._append(alike[0], common[0][depth:deeper], parent, depth)
            self.branch(alike, heads, share_from, run, deeper)

    def lay(self, number: int, shared: int, parent: int, depth: int) -> None:
        """Lays one group, whose members share `shared` tokens and the first `depth` of these with what is there."""
        group = self._groups[number]
        if len(group) > 1 and shared > depth:
            parent, depth = self._append(number, group[0][depth:shared], parent, depth), shared
        self.leaves[number] = [self._append(number, member[depth:], parent, depth) for member in group]

    def _append(self, number: int, tokens: TokenIds, parent: int, offset: int) -> int:
        self.costs[number] += len(tokens)
        self.runs.append(Run(len(self.ids), len(tokens), parent, offset))
        self.ids.extend(tokens)
        self.position_ids.extend(range(offset, offset + len(tokens)))
        return len(self.runs) - 1


def _common(first: TokenIds, second: TokenIds) -> int:
    """Returns how many leading tokens two sequences share."""
    limit = min(len(first), len(second))
    return next((index for index in range(limit) if first[index] != second[index]), limit)
