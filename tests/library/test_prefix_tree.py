"""The tree of kept prefixes against a brute-force dictionary of all prefixes, and its order of eviction by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from marginrm.prefix_cache.tree import PrefixTree, TokenArray

LARGE = 10_000


@dataclass
class Kept:
    """Contents that are the tokens themselves, so that a mix-up shows."""

    tokens: list[int]

    def part(self, start: int, stop: int) -> Kept:
        return Kept(self.tokens[start:stop])


def array(ids: list[int]) -> TokenArray:
    return np.asarray(ids, np.int32)


def store(tree: PrefixTree[Kept], ids: list[int], root: str = "", *, cold: bool | None = None) -> bool:
    """Keeps a sequence as a step does: what is known is read, and the rest takes reserved room."""
    whole = tree.whole(len(ids))
    parts = tree.match(root, array(ids))
    tree.use(parts)
    start = sum(part.used for part in parts)
    taken = tree.enters_cold(parts, whole - start) if cold is None else cold
    room = whole > start and tree.reserve(whole - start, cold=taken)
    if room:
        tree.insert(root, array(ids[:whole]), start, Kept(ids[start:whole]))
    tree.unpin(parts)
    return room


def found(tree: PrefixTree[Kept], ids: list[int], root: str = "") -> list[int]:
    """Returns the kept contents of the longest known prefix."""
    tokens: list[int] = []
    for node, used in tree.match(root, array(ids)):
        assert node.contents is not None
        assert len(node.contents.tokens) == len(node.tokens)
        tokens += node.contents.tokens[:used]
    return tokens


sequences = st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=12)), max_size=20)


@given(sequences, st.integers(1, 3))
def test_the_longest_common_prefix_is_found_in_whole_blocks(work: list[tuple[str, list[int]]], block: int) -> None:
    tree: PrefixTree[Kept] = PrefixTree(LARGE, block)
    twin: set[tuple[str, tuple[int, ...]]] = set()
    for root, ids in work:
        known = [n for n in range(0, len(ids) + 1, block) if (root, tuple(ids[:n])) in twin or not n]
        assert found(tree, ids, root) == ids[: max(known)]
        store(tree, ids, root)
        twin |= {(root, tuple(ids[:n])) for n in range(block, len(ids) + 1, block)}
        assert tree.tokens == block * len(twin)  # every block is kept once


@given(sequences, st.integers(1, 3), st.integers(0, 24))
def test_the_bound_holds_and_what_is_left_is_right(
    work: list[tuple[str, list[int]]], block: int, max_tokens: int
) -> None:
    tree: PrefixTree[Kept] = PrefixTree(max_tokens, block)
    for root, ids in work:
        before = found(tree, ids, root)
        assert before == ids[: len(before)]
        assert len(before) % block == 0
        if store(tree, ids, root):
            assert len(found(tree, ids, root)) == tree.whole(len(ids))
        assert len(found(tree, ids, root)) >= len(before)  # what a step reads stays
        assert tree.tokens <= max_tokens
        assert tree.reserved == 0
    tree.clear()
    assert tree.tokens == 0


def test_the_least_recently_used_leaves_first() -> None:
    tree: PrefixTree[Kept] = PrefixTree(6, 2)
    for first in (1, 2, 3):
        assert store(tree, [first, first])
    store(tree, [1, 1])  # read again
    assert store(tree, [4, 4])
    assert [found(tree, [one, one]) for one in (1, 2, 3, 4)] == [[1, 1], [], [3, 3], [4, 4]]
    assert tree.evicted == 2


def test_a_second_response_takes_no_room_of_prompts() -> None:
    tree: PrefixTree[Kept] = PrefixTree(16, 2)
    prompt = [1, 1, 1, 1]
    assert store(tree, [2, 2, 2, 2, 2, 2])
    assert store(tree, [*prompt, 5, 5])
    assert store(tree, [*prompt, 6, 6])  # free room
    assert store(tree, [*prompt, 7, 7])
    for response in range(8, 30):
        store(tree, [*prompt, response, response])
        assert found(tree, prompt) == prompt
        assert found(tree, [2] * 6) == [2] * 6


def test_responses_leave_before_an_older_prompt() -> None:
    tree: PrefixTree[Kept] = PrefixTree(32, 2)
    store(tree, [2, 2])  # the oldest
    for response in (5, 6, 7):
        store(tree, [*[1] * 24, response, response])
    assert tree.tokens == 30, "a third response took the room of another"
    for prompt in (3, 4):
        store(tree, [prompt, prompt])
    assert tree.tokens == 32
    assert found(tree, [2, 2]) == [2, 2]
    assert found(tree, [1] * 24) == [1] * 24


def test_responses_take_an_eighth_of_the_room() -> None:
    tree: PrefixTree[Kept] = PrefixTree(64, 2)
    for response in range(5, 40):
        assert store(tree, [1, 1, 1, 1, 1, 1, response, response])
    assert tree.tokens == 6 + 64 // 8
    assert not tree.reserve(10, cold=True), "more than an eighth"
    assert tree.reserve(8, cold=True)
    assert not tree.reserve(2, cold=True), "the reservation counts"


def test_a_response_that_is_continued_is_no_longer_one_that_leaves_first() -> None:
    tree: PrefixTree[Kept] = PrefixTree(64, 2)
    prompt = [1] * 8
    for response in ([5, 5], [6, 6]):
        store(tree, [*prompt, *response])
    assert tree.reserve(2)
    tree.insert("", array([*prompt, 6, 6, 9, 9]), 10, Kept([9, 9]))  # a step that did not read the response
    for response in range(20, 40):
        assert store(tree, [*prompt, response, response])
    assert found(tree, [*prompt, 6, 6, 9, 9]) == [*prompt, 6, 6, 9, 9]


def test_turns_of_a_chat_are_kept_at_the_recent_end() -> None:
    tree: PrefixTree[Kept] = PrefixTree(8, 2)
    chat: list[int] = []
    store(tree, [9, 9])
    for turn in range(1, 5):
        chat += [turn, turn]
        assert store(tree, chat)
    assert found(tree, chat) == chat
    assert found(tree, [9, 9]) == []


def test_a_pinned_span_stays_and_makes_a_step_go_without() -> None:
    tree: PrefixTree[Kept] = PrefixTree(4, 2)
    store(tree, [1, 1, 1, 1])
    parts = tree.match("", array([1, 1, 1, 1]))
    tree.use(parts)
    assert not store(tree, [2, 2])
    assert found(tree, [1, 1, 1, 1]) == [1, 1, 1, 1]
    tree.unpin(parts)
    assert store(tree, [2, 2])
    assert not tree.reserve(5)  # more than the whole


def test_a_span_whose_beginning_has_left_is_dropped() -> None:
    tree: PrefixTree[Kept] = PrefixTree(8, 2)
    store(tree, [1, 1])
    assert tree.reserve(2)
    tree.clear()
    tree.insert("", array([1, 1, 2, 2]), 2, Kept([2, 2]))
    assert found(tree, [1, 1, 2, 2]) == []
    assert tree.tokens == tree.reserved == 0
