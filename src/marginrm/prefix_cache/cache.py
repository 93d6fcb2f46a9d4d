"""The prefix cache of one model, and the part of it that one step reads and fills.

At the start of a step each group is looked up: its longest kept prefix is read, and the row holds only the tokens
behind it. During the forward pass each attention call reads the kept keys and values, and hands over those of new
tokens; the tree takes them when the step has succeeded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marginrm.attention.gathered import sequences_of
from marginrm.attention.layout import KeysAndValues
from marginrm.encoding import EncodedGroup
from marginrm.packing import ROOT, UNCACHED, CachedStarts, Ints, PackingPlan
from marginrm.prefix_cache.tree import BLOCK, Part, PrefixTree, TokenArray
from marginrm.steps import PrefixUse, reusable

# A shorter prefix is not worth an attention call of its own.
READ_FROM = 2 * BLOCK


@dataclass(frozen=True, slots=True)
class Span:
    """Keys and values of consecutive tokens, one entry for each attention call of a forward pass."""

    calls: list[KeysAndValues]

    def part(self, start: int, stop: int) -> Span:
        """Returns a copy of tokens `start` to `stop` (exclusive)."""
        return Span([KeysAndValues(*(_copy(one[:, start:stop]) for one in call)) for call in self.calls])


class PrefixCache:
    """Keys and values of prefixes that earlier steps of one model have computed. Thread-safe.

    Args:
        max_bytes: The most memory that they may take.
        token_bytes: Memory of one token's keys and values.
    """

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.token_bytes = token_bytes
        self._tree: PrefixTree[Span] = PrefixTree(max_bytes // token_bytes)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Memory of what is kept, in bytes."""
        return self._tree.tokens * self.token_bytes

    def cached_tokens(self, ids: TokenArray, tenant: str) -> int:
        """Returns how many first tokens of a sequence are kept now.

        Args:
            ids: Token ids, at most as many as `steps.reusable` says.
            tenant: As for `step`.
        """
        with self._lock:
            found = sum(part.used for part in self._tree.match(tenant, ids))
        return found if found >= READ_FROM else 0

    @contextmanager
    def step(self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None]) -> Iterator[StepPrefixes]:
        """Looks groups up and keeps what they read until the end of the context.

        Args:
            groups: The groups of one forward pass.
            tenants: For each group the name under which it reads and keeps prefixes; None neither reads nor keeps.
        """
        with self._lock:
            step = StepPrefixes(self._tree, self._lock, groups, tenants)
        try:
            yield step
        finally:
            with self._lock:
                step.close()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._tree.clear()


@dataclass(slots=True)
class _Kept:
    """A span to keep: rows of the step, and what each attention call gave for them so far."""

    tenant: str
    ids: TokenArray
    start: int
    rows: Tensor | slice
    branches: bool
    calls: list[KeysAndValues] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.start

    def take(self, key: Tensor, value: Tensor) -> None:
        if isinstance(self.rows, slice):
            self.calls.append(KeysAndValues(_copy(key[0][:, self.rows]), _copy(value[0][:, self.rows])))
            return
        self.rows = self.rows.to(key.device)
        self.calls.append(KeysAndValues(key[0].index_select(1, self.rows), value[0].index_select(1, self.rows)))


class StepPrefixes:
    """The prefixes of one forward pass. Made by `PrefixCache.step`.

    Attributes:
        starts: For the packing plan: the cached prefixes, and the groups that begin with them.
        use: What the step took from the cache.
    """

    def __init__(
        self,
        tree: PrefixTree[Span],
        lock: threading.Lock,
        groups: Sequence[EncodedGroup],
        tenants: Sequence[str | None],
    ) -> None:
        self._tree = tree
        self._lock = lock
        self._groups = groups
        self._tenants = tenants
        self._reads: list[list[Part[Span]]] = []
        self._known: list[list[tuple[Span, int]]] = []
        self._kept: list[_Kept] = []
        self._calls = 0
        self._evicted_before = self._tree.evicted
        self.starts = self._look_up()
        lengths = [self.starts.lengths[prefix] for prefix in self.starts.of_group if prefix != UNCACHED]
        self.use = PrefixUse(hits=len(lengths), tokens=sum(lengths))

    def _look_up(self) -> CachedStarts:
        indices: dict[tuple[int, int], int] = {}
        lengths: list[int] = []
        of_group = []
        for group, tenant in zip(self._groups, self._tenants, strict=True):
            parts = [] if tenant is None else self._tree.match(tenant, group[0].array[: reusable(group)])
            length = sum(part.used for part in parts)
            if length < READ_FROM:
                of_group.append(UNCACHED)
                continue
            index = indices.setdefault((id(parts[-1].node), length), len(lengths))
            if index == len(lengths):
                lengths.append(length)
                self._tree.use(parts)
                self._reads.append(parts)
                self._known.append([(part.node.contents, part.used) for part in parts if part.node.contents])
            of_group.append(index)
        return CachedStarts(tuple(lengths), tuple(of_group))

    def choose(self, plan: PackingPlan) -> None:
        """Chooses the spans to keep, and makes room for them.

        Kept are runs that several sequences continue, and the whole of a sequence without siblings in its group, since
        its prompt's end is not known. A span begins at the first block that ends in its run.

        Args:
            plan: The plan of the row, made with `starts`.
        """
        rows = sequences_of(plan)
        done: dict[int, bool] = {}  # by run: whether what follows it may be kept
        leaves = iter(plan.leaves)
        with self._lock:
            for group, tenant in zip(self._groups, self._tenants, strict=True):
                for member in group:
                    leaf = next(leaves)
                    path = [*plan.ancestors(leaf), *([leaf] if len(group) == 1 else [])]
                    for run, before in zip(path, [None, *path], strict=False):
                        if tenant is not None and run not in done:
                            allowed = before is None or done[before]
                            branches = run != leaf
                            done[run] = allowed and self._keep(
                                plan, run, member.array, rows[run], tenant, branches=branches
                            )

    def _keep(self, plan: PackingPlan, run: int, ids: TokenArray, rows: Ints, tenant: str, *, branches: bool) -> bool:
        """Reserves the room of a run's blocks; returns whether there is room, or none is needed."""
        offset, length, cached = plan.runs[run].offset, plan.runs[run].length, plan.runs[run].cached
        known = 0 if cached == UNCACHED else plan.cached[cached]
        start, stop = self._tree.whole(offset), self._tree.whole(offset + length)
        if stop <= start:
            return True
        # Behind a run of this row it is one of several continuations.
        after_run = plan.runs[run].parent != ROOT
        cold = (
            not branches and stop - start < start
            if after_run
            else self._tree.enters_cold(self._tree.match(tenant, ids[:stop]), stop - start)
        )
        if not self._tree.reserve(stop - start, cold=cold):
            return False
        chosen = rows[start - known : stop - known]
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        in_line = last - first == len(chosen)
        picked = slice(first, last) if in_line else torch.from_numpy(chosen)
        self._kept.append(_Kept(tenant, ids[:stop], start, picked, branches))
        return True

    def exchange(self, key: Tensor, value: Tensor) -> list[KeysAndValues]:
        """Takes keys and values of the row's new tokens in the next attention call; returns those of cached prefixes.

        Args:
            key: [1, key heads, tokens, head size].
            value: [1, key heads, tokens, value size].
        """
        call, self._calls = self._calls, self._calls + 1
        for kept in self._kept:
            kept.take(key, value)
        return [_joined([(span.calls[call], used) for span, used in parts]) for parts in self._known]

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values in the attention calls so far; 0 if nothing is to be kept."""
        calls = self._kept[0].calls if self._kept else []
        return sum(one.element_size() * one.shape[0] * one.shape[2] for call in calls for one in call)

    def commit(self) -> None:
        """Gives what the step has computed to the cache. Call it once the step has succeeded."""
        with self._lock:
            for kept in self._kept:
                self._tree.insert(kept.tenant, kept.ids, kept.start, Span(kept.calls), branches=kept.branches)
            self._kept.clear()

    def close(self) -> None:
        """Gives back what the step has reserved and pinned. The cache calls it, under its lock."""
        for kept in self._kept:
            self._tree.release(kept.tokens)
        self._kept.clear()
        for parts in self._reads:
            self._tree.unpin(parts)
        self._reads.clear()
        self._known.clear()
        self.use += PrefixUse(evicted=self._tree.evicted - self._evicted_before)


def _joined(parts: Sequence[tuple[KeysAndValues, int]]) -> KeysAndValues:
    """Returns the first tokens of some spans as one; a lone span is not copied."""
    pieces = [KeysAndValues(*(one[:, :used] for one in call)) for call, used in parts]
    return pieces[0] if len(pieces) == 1 else KeysAndValues(*(torch.cat(both, 1) for both in zip(*pieces, strict=True)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
