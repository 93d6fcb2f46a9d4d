"""Groups of token ids -> one row without padding, in which the tokens that a group's members share appear once.

A plan is a forest of *runs*. A run is a stretch of consecutive tokens in the row; its tokens attend to each other and
to the runs above it (parent, grandparent, ...). A group whose members share a prefix becomes a run for their longest
common prefix and one child run per member for its suffix; groups whose prefixes start alike (one system prompt, one
prompt in many requests, whole texts of candidates) branch from one copy of that, as in a radix tree. Prefixes are
found on token ids, so it does not matter where a tokenizer puts its boundaries.

The first tokens of a sequence may be *cached*: their keys and values are known from earlier steps (`prefix_cache`), so
they are not in the row. Sequences with the same cached prefix branch from it.

Everything here is array code on integers and independent of torch; `forward.batch` turns a plan into tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
TokenIds = Sequence[int] | NDArray[np.int32]
Group = Sequence[TokenIds]
ROOT = -1
UNCACHED = -1
# Groups share a common start of at least this many tokens: the first tokens of a chat template are not worth a run.
SHARE_FROM = 32


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of the row that attend to each other and to their ancestors.

    Attributes:
        start: Row index of the first token.
        length: Number of tokens, at least 1.
        parent: Index of the run that comes before it in the sequence, or `ROOT`.
        offset: Position id of the first token: the number of tokens in all ancestors and in the cached prefix.
        cached: Index of the cached prefix that its sequence begins with, or `UNCACHED`.
    """

    start: int
    length: int
    parent: int
    offset: int
    cached: int = UNCACHED

    @property
    def stop(self) -> int:
        """Row index after the last token."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class CachedStarts:
    """The cached prefixes of groups.

    Attributes:
        lengths: Tokens of each prefix. No two of them are the same tokens.
        of_group: For each group the index of its prefix, or `UNCACHED`. Each member has at least one token more.
    """

    lengths: tuple[int, ...]
    of_group: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """How groups lie in one row.

    Attributes:
        ids: Token ids of the row, [tokens] int64.
        position_ids: Position of each token in the sequence it came from, counted from 0, [tokens] int64.
        runs: The stretches of the row, parents before children.
        leaves: For each response, in the order given, the index of the run that holds its end.
        costs: Tokens that each group put into the row; a prefix that several groups share counts for the first one.
        causal: Whether a token attends only to the tokens before it (decoders), or to its whole sequence (encoders).
        filler: Index of the run that only fills the row to a multiple and belongs to no response, or None.
        cached: Tokens of each cached prefix, none of which is in the row.
    """

    ids: Ints
    position_ids: Ints
    runs: tuple[Run, ...]
    leaves: tuple[int, ...]
    costs: tuple[int, ...]
    causal: bool
    filler: int | None = None
    cached: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The runs that end a sequence: the leaves, and the filler if there is one."""
        return self.leaves if self.filler is None else (*self.leaves, self.filler)

    @property
    def first(self) -> list[int]:
        """Row index of each response's first token; several responses may share it."""
        roots: list[int] = []
        for index, run in enumerate(self.runs):
            roots.append(index if run.parent == ROOT else roots[run.parent])
        return [self.runs[roots[leaf]].start for leaf in self.leaves]

    @property
    def last(self) -> list[int]:
        """Row index of each response's last token."""
        return [self.runs[leaf].stop - 1 for leaf in self.leaves]

    def read_at(self, positions: Sequence[Sequence[int] | None]) -> tuple[list[int], list[int]]:
        """Returns the row indices that values are read at, and those of the first tokens of their sequences.

        Args:
            positions: For each response the indices of tokens in its sequence; None for its last token.

        Returns:
            Two lists with an entry for each value, in the order of the responses and of their positions.
        """
        read: list[int] = []
        first: list[int] = []
        for leaf, start, wanted in zip(self.leaves, self.first, positions, strict=True):
            path = [*self.ancestors(leaf), leaf]
            last = self.runs[leaf].offset + self.runs[leaf].length - 1
            for position in (last,) if wanted is None else wanted:
                run = next(self.runs[one] for one in reversed(path) if self.runs[one].offset <= position)
                read.append(run.start + position - run.offset)
                first.append(start)
        return read, first

    def cached_before(self) -> Ints:
        """Returns for each token the index of the cached prefix that its sequence begins with, or `UNCACHED`, [tokens]."""
        return np.repeat([run.cached for run in self.runs], [run.length for run in self.runs])

    def ancestors(self, run: int) -> list[int]:
        """Returns the runs that a run continues, first to last."""
        found: list[int] = []
        parent = self.runs[run].parent
        while parent != ROOT:
            found.append(parent)
            parent = self.runs[parent].parent
        return found[::-1]

    def seen_by(self) -> tuple[Ints, Ints]:
        """Returns for each token the first row index that attends to it and the one after the last, [tokens] each.

        A row is laid depth-first, so the tokens that continue a token lie in one stretch. In a decoder that is from the
        token itself to the end of all that branches from its run; in an encoder it is its whole sequence.
        """
        stops = [run.stop for run in self.runs]
        for index in reversed(range(len(self.runs))):  # children before their parents
            parent = self.runs[index].parent
            if parent != ROOT:
                stops[parent] = max(stops[parent], stops[index])
        lengths = [run.length for run in self.runs]
        starts = np.arange(len(self.ids)) if self.causal else np.repeat([run.start for run in self.runs], lengths)
        return starts, np.repeat(stops, lengths)


def shared_prefix(group: Group) -> int:
    """Returns how many leading tokens all members share, leaving each member at least one token of its own."""
    if len(group) < 2:
        return 0
    shortest = min(len(member) for member in group)
    return _common_prefix([_array(member) for member in group], shortest - 1)


def cost(group: Group, *, share_prefix: bool) -> int:
    """Returns how many tokens a group puts into a row of its own."""
    shared = shared_prefix(group) if share_prefix else 0
    return sum(len(member) for member in group) - shared * max(len(group) - 1, 0)


def plan_row(
    groups: Sequence[Group],
    *,
    causal: bool,
    share_from: int = SHARE_FROM,
    multiple: int = 1,
    cached: CachedStarts | None = None,
) -> PackingPlan:
    """Lays groups end to end in one row.

    Args:
        groups: For each group the token ids of its members, each with at least one token.
        causal: Whether the model is a decoder, whose members may attend to one copy of their common prefix; an encoder
            shares nothing.
        share_from: Groups that start alike share those tokens too when there are at least so many.
        multiple: The row is filled to a multiple of so many tokens, by a run that no response attends to.
        cached: The first tokens of groups that the row leaves out, for decoders; None for none.

    Returns:
        The plan; its leaves follow the order of the groups and of their members.
    """
    row = _Row([[_array(member) for member in group] for group in groups], cached)
    if causal:
        heads = [group[0][: shared_prefix(group) if len(group) > 1 else -1] for group in row.groups]
        row.branch_all(heads, share_from)
    else:
        for number in range(len(groups)):
            row.lay(number, 0, ROOT, 0)
    return row.plan(causal=causal, multiple=multiple)


class _Row:
    """A row while groups are laid into it."""

    def __init__(self, groups: Sequence[Sequence[NDArray[np.int32]]], cached: CachedStarts | None) -> None:
        self.groups = groups
        self._cached = cached or CachedStarts((), (UNCACHED,) * len(groups))
        self._tokens = 0
        self._parts: list[NDArray[np.int32]] = []
        self._runs: list[Run] = []
        self._leaves: list[list[int]] = [[] for _ in groups]
        self._costs = [0] * len(groups)

    def branch_all(self, heads: Sequence[NDArray[np.int32]], share_from: int) -> None:
        """Lays all groups, those with the same cached prefix one after another."""
        together: dict[int, list[int]] = defaultdict(list)
        for number, prefix in enumerate(self._cached.of_group):
            together[prefix].append(number)
        for prefix, numbers in together.items():
            depth = 0 if prefix == UNCACHED else self._cached.lengths[prefix]
            self.branch(numbers, heads, share_from, ROOT, depth)

    def branch(
        self, numbers: list[int], heads: Sequence[NDArray[np.int32]], share_from: int, parent: int, depth: int
    ) -> None:
        """Lays groups whose heads agree on `depth` tokens, which `parent` ends.

        Groups that agree on `share_from` more tokens get one run for all that they share, and branch from there. The
        order of first appearance is kept.
        """
        near: dict[bytes | int, list[int]] = defaultdict(list)
        for number in numbers:
            start = heads[number][depth : depth + share_from]
            # A head that is too short shares nothing, so it is alone under its own number.
            near[start.tobytes() if len(start) == share_from else number].append(number)
        for alike in near.values():
            if len(alike) == 1:
                self.lay(alike[0], len(heads[alike[0]]), parent, depth)
                continue
            common = [heads[number] for number in alike]
            deeper = _common_prefix(common, min(map(len, common)))
            run = self._append(alike[0], common[0][depth:deeper], parent, depth)
            self.branch(alike, heads, share_from, run, deeper)

    def lay(self, number: int, shared: int, parent: int, depth: int) -> None:
        """Lays one group, whose members share `shared` tokens and the first `depth` of these with what is there."""
        group = self.groups[number]
        if len(group) > 1 and shared > depth:
            parent, depth = self._append(number, group[0][depth:shared], parent, depth), shared
        self._leaves[number] = [self._append(number, member[depth:], parent, depth) for member in group]

    def plan(self, *, causal: bool, multiple: int) -> PackingPlan:
        """Returns the row as a plan, filled to a multiple of so many tokens."""
        missing = -self._tokens % multiple
        runs, parts = self._runs, self._parts
        if missing:
            runs = [*runs, Run(self._tokens, missing, ROOT, 0)]
            parts = [*parts, np.zeros(missing, np.int32)]
        starts = np.fromiter((run.start - run.offset for run in runs), np.int64, len(runs))
        lengths = np.fromiter((run.length for run in runs), np.int64, len(runs))
        positions = np.arange(self._tokens + missing) - np.repeat(starts, lengths)
        positions[self._tokens :] = 0  # a filler may be longer than the model has positions
        return PackingPlan(
            ids=np.concatenate(parts).astype(np.int64),
            position_ids=positions,
            runs=tuple(runs),
            leaves=tuple(leaf for found in self._leaves for leaf in found),
            costs=tuple(self._costs),
            causal=causal,
            filler=len(runs) - 1 if missing else None,
            cached=self._cached.lengths,
        )

    def _append(self, number: int, tokens: NDArray[np.int32], parent: int, offset: int) -> int:
        self._costs[number] += len(tokens)
        self._runs.append(Run(self._tokens, len(tokens), parent, offset, self._cached.of_group[number]))
        self._tokens += len(tokens)
        self._parts.append(tokens)
        return len(self._runs) - 1


def _array(ids: TokenIds) -> NDArray[np.int32]:
    return np.asarray(ids, dtype=np.int32)


def _common_prefix(members: Sequence[NDArray[np.int32]], limit: int) -> int:
    """Returns how many of the first `limit` tokens all members share."""
    if not limit:
        return 0
    table = np.stack([member[:limit] for member in members])
    differs = (table[1:] != table[0]).any(0)
    place = int(differs.argmax())
    return place if differs[place] else limit
