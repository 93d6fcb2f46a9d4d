"""A radix tree of token sequences, in whole blocks, bounded in tokens: least recently used spans leave first.

A node is a *span*: consecutive tokens that follow those of its parent. Spans begin and end at multiples of `BLOCK`
tokens, so a child is found by the bytes of its first block. A span that begins a sequence, or continues one at its end
as a next turn of a chat does, enters as the most recently used. A span that branches off a longer one, as the second
response to a prompt does, enters as the least recently used, and takes the room of others of its kind only. Such *cold*
spans are seldom read, so they take at most an eighth of the room: new memory costs time where a span is copied to it.

Everything here is independent of torch: a span's contents are opaque.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

# Small enough to compute few tokens of a prefix again, large enough for kernels that dislike ragged ends.
BLOCK = 16
_COLD_SHARE = 8  # of the room, cold spans take one part in this many

TokenArray = NDArray[np.int32]


class Contents(Protocol):
    """The contents of a span."""

    def part(self, start: int, stop: int) -> Self:
        """Returns a copy of tokens `start` to `stop` (exclusive), which keeps no memory of the rest alive."""


ContentsT = TypeVar("ContentsT", bound=Contents)


@dataclass(eq=False, slots=True)
class Node(Generic[ContentsT]):
    """A span of tokens.

    Attributes:
        tokens: Token ids, whole blocks, [tokens] int32.
        contents: What is kept of them; None for a root.
        parent: The span before it; None for a root.
        children: The spans after it, by the bytes of their first block.
        pins: Steps in progress that read it or continue it.
        read: Whether a later sequence has read all of it.
        branched: Whether sequences have continued it in different ways.
        cold: Whether it entered as the least recently used, and was not read since.
    """

    tokens: TokenArray
    contents: ContentsT | None
    parent: Node[ContentsT] | None
    children: dict[bytes, Node[ContentsT]] = field(default_factory=dict)
    pins: int = 0
    read: bool = False
    branched: bool = False
    cold: bool = False


class Part(NamedTuple, Generic[ContentsT]):
    """The first `used` tokens of a span."""

    node: Node[ContentsT]
    used: int


class PrefixTree(Generic[ContentsT]):
    """The spans of one model. Not thread-safe.

    Args:
        max_tokens: The most tokens of all spans together, and of those that are reserved.
        block: Tokens of a block.

    Attributes:
        tokens: Tokens of all spans.
        reserved: Tokens for which room was made, and that were not inserted yet.
        evicted: Tokens that have left to make room.
    """

    def __init__(self, max_tokens: int, block: int = BLOCK) -> None:
        self.block = block
        self.tokens = self.reserved = self.evicted = 0
        self._max_tokens = max_tokens
        self._cold_tokens = 0  # of all cold spans
        self._roots: dict[str, Node[ContentsT]] = {}
        # The order of use. A parent is always behind its children, so the first one without pins is a leaf.
        self._order: OrderedDict[Node[ContentsT], None] = OrderedDict()

    def whole(self, tokens: int) -> int:
        """Returns a number of tokens, rounded down to whole blocks."""
        return tokens // self.block * self.block

    def match(self, root: str, ids: TokenArray) -> list[Part[ContentsT]]:
        """Returns the spans of the longest kept prefix of a sequence, in whole blocks. It changes nothing.

        Args:
            root: Sequences under different names never meet.
            ids: Token ids.
        """
        parts: list[Part[ContentsT]] = []
        node, depth = self._roots.get(root), 0
        while node is not None:
            child = node.children.get(ids[depth : depth + self.block].tobytes())
            if child is None:
                break
            used = self.whole(_agreeing(child.tokens, ids[depth:]))
            parts.append(Part(child, used))
            depth += used
            node = child if used == len(child.tokens) else None
        return parts

    def use(self, parts: Sequence[Part[ContentsT]]) -> None:
        """Makes spans the most recently used, and pins them until `unpin`."""
        if not parts:
            return
        for node, used in parts:
            node.read |= used == len(node.tokens)
            self._mark(node, cold=False)
        last = parts[-1].node
        last.pins += 1  # those before it have a child, so they stay too
        self._touch(last)

    def unpin(self, parts: Sequence[Part[ContentsT]]) -> None:
        """Ends what `use` began."""
        if parts:
            parts[-1].node.pins -= 1

    def enters_cold(self, parts: Sequence[Part[ContentsT]], tokens: int) -> bool:
        """Returns whether a span of so many tokens after a match would enter as the least recently used."""
        if not parts:
            return False
        node, used = parts[-1]
        branches = used < len(node.tokens) or bool(node.children) or node.branched
        return branches and tokens < sum(part.used for part in parts)

    def reserve(self, tokens: int, *, cold: bool = False) -> bool:
        """Makes room for a span, and returns whether there is any. `insert` or `release` ends the reservation.

        Args:
            tokens: Tokens of the span.
            cold: It may take the room of other cold spans only, and no more than an eighth of the whole with them.
        """
        share = self._max_tokens // _COLD_SHARE
        wanted = self.reserved + tokens  # what a step has reserved before may be cold too
        if wanted > (share if cold else self._max_tokens):
            return False
        while self.tokens + wanted > self._max_tokens or (cold and self._cold_tokens + wanted > share):
            if not self._evict(only_cold=cold):
                return False
        self.reserved += tokens
        return True

    def release(self, tokens: int) -> None:
        """Gives reserved room back."""
        self.reserved -= tokens

    def insert(self, root: str, ids: TokenArray, start: int, contents: ContentsT, *, branches: bool = False) -> None:
        """Keeps the end of a sequence, for which room is reserved. Tokens that are kept already stay as they are.

        Nothing is kept if the tokens before `start` have left in the meantime.

        Args:
            root: As for `match`.
            ids: Token ids of the whole sequence up to the span's end, whole blocks.
            start: Index of the span's first token, whole blocks.
            contents: What to keep of the span.
            branches: Sequences are known to continue it in different ways.
        """
        self.release(len(ids) - start)
        parts = self.match(root, ids)
        depth = sum(part.used for part in parts)
        if not start <= depth < len(ids):
            return
        cold = self.enters_cold(parts, len(ids) - depth)
        for ancestor, _ in parts:
            self._mark(ancestor, cold=False)  # a sequence continues it
        parent = self._roots.setdefault(root, Node(ids[:0], None, None))
        if parts:
            parent, used = parts[-1]
            parent = self._split(parent, used) if used < len(parent.tokens) else parent
            parent.branched |= bool(parent.children)
        rest = contents.part(depth - start, len(ids) - start) if depth > start else contents
        node = Node(ids[depth:].copy(), rest, parent, branched=branches)
        self._mark(node, cold=cold)
        parent.children[node.tokens[: self.block].tobytes()] = node
        self.tokens += len(node.tokens)
        self._order[node] = None
        self._touch(node)
        if node.cold:
            self._order.move_to_end(node, last=False)

    def clear(self) -> None:
        """Forgets all spans."""
        self.evicted += self.tokens
        self.tokens = self._cold_tokens = 0
        self._roots.clear()
        self._order.clear()

    def _mark(self, node: Node[ContentsT], *, cold: bool) -> None:
        self._cold_tokens += (cold - node.cold) * len(node.tokens)
        node.cold = cold

    def _touch(self, node: Node[ContentsT] | None) -> None:
        """Makes a span and those before it the most recently used, if they are still kept."""
        while node is not None and node in self._order:
            self._order.move_to_end(node)
            node = node.parent

    def _split(self, node: Node[ContentsT], at: int) -> Node[ContentsT]:
        """Cuts a span in two and returns the first part. Its end, if it was never read, becomes cold."""
        assert node.parent is not None
        assert node.contents is not None
        contents = node.contents
        cold = node.cold
        self._mark(node, cold=False)  # while its tokens change
        upper = Node(node.tokens[:at].copy(), contents.part(0, at), node.parent, read=True, branched=True)
        node.parent.children[upper.tokens[: self.block].tobytes()] = upper
        node.contents, node.tokens = contents.part(at, len(node.tokens)), node.tokens[at:].copy()
        node.parent = upper
        self._mark(node, cold=cold and not node.children)
        upper.children[node.tokens[: self.block].tobytes()] = node
        self._order[upper] = None
        self._touch(upper)
        if not node.read and not node.children:
            self._mark(node, cold=True)
            self._order.move_to_end(node, last=False)
        return upper

    def _evict(self, *, only_cold: bool) -> bool:
        """Drops the least recently used span that may leave; returns whether there was one."""
        for node in self._order:
            if only_cold and not node.cold:
                return False
            if not node.children and not node.pins:
                self._remove(node)
                return True
        return False

    def _remove(self, node: Node[ContentsT]) -> None:
        assert node.parent is not None
        del self._order[node]
        del node.parent.children[node.tokens[: self.block].tobytes()]
        self.tokens -= len(node.tokens)
        self._mark(node, cold=False)
        self.evicted += len(node.tokens)
        for root in [name for name, found in self._roots.items() if found is node.parent and not found.children]:
            del self._roots[root]


def _agreeing(first: TokenArray, second: TokenArray) -> int:
    """Returns how many leading tokens two arrays share."""
    shortest = min(len(first), len(second))
    differs = first[:shortest] != second[:shortest]
    place = int(differs.argmax())
    return place if differs[place] else shortest
