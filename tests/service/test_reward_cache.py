"""The reward cache: keys, bounded memory, and eviction of the least recently used."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm.encoding import EncodedResponse
from marginrm.errors import ConfigError
from marginrm_service.engine.reward_cache import ENTRY_BYTES, RewardCache, key_of, positions_by_key
from marginrm_service.settings import Settings
from support.service import group


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    cache = RewardCache(3 * ENTRY_BYTES)
    for key, reward in ((b"a", 1.0), (b"b", 0.0), (b"c", 3.0)):
        cache.put(key, reward)
    assert cache.get(b"a") == 1.0  # used, so b is the oldest
    cache.put(b"d", 4.0)
    assert [cache.get(key) for key in (b"a", b"b", b"c", b"d")] == [1.0, None, 3.0, 4.0]
    cache.put(b"a", 5.0)  # as first given, but used
    cache.put(b"e", 6.0)
    assert [cache.get(key) for key in (b"a", b"c", b"d", b"e")] == [1.0, None, 4.0, 6.0]
    assert (len(cache), cache.size) == (3, 3 * ENTRY_BYTES)


def test_a_cache_too_small_for_an_entry_stores_none() -> None:
    cache = RewardCache(ENTRY_BYTES - 1)
    cache.put(b"a", 1.0)
    assert (cache.get(b"a"), cache.size) == (None, 0)


@given(
    st.integers(0, 5), st.lists(st.tuples(st.sampled_from(["get", "put"]), st.sampled_from("abcdefgh")), max_size=60)
)
def test_the_cache_equals_a_list_ordered_by_last_use(most: int, calls: list[tuple[str, str]]) -> None:
    cache, twin = RewardCache(most * ENTRY_BYTES + ENTRY_BYTES // 2), []
    for reward, (call, name) in enumerate(calls):
        key = name.encode()
        known = next((entry for entry in twin if entry[0] == key), None)
        if known:
            twin.remove(known)
        if call == "get":
            assert cache.get(key) == (known[1] if known else None)
        else:
            cache.put(key, float(reward))
            known = known or (key, float(reward))
        twin = [*twin, known][-most:] if known and most else twin
        assert len(cache) == len(twin)
        assert cache.size <= most * ENTRY_BYTES


def test_an_entry_takes_no_more_memory_than_it_is_counted_as() -> None:
    entries = 22_000  # where the table has the most room to spare
    tracemalloc.start()
    cache = RewardCache(entries * ENTRY_BYTES)
    for reward in range(3 * entries):
        cache.put(os.urandom(16), float(reward))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache) == entries
    assert ENTRY_BYTES / 2 < taken / entries < ENTRY_BYTES


def test_a_key_depends_on_everything_that_a_model_reads_and_on_nothing_else() -> None:
    different = [
        EncodedResponse((1, 2, 3)),
        EncodedResponse((1, 2)),
        EncodedResponse((1, 2, 4)),
        EncodedResponse((2, 1, 3)),
        EncodedResponse((1, 2, 3 << 8)),
        EncodedResponse((1, 2, 3), (0, 0, 1)),
        EncodedResponse((1, 2, 3), (0, 1, 1)),
    ]
    assert len({key_of(response) for response in different}) == len(different)
    assert key_of(EncodedResponse((1, 2, 3), truncated=True)) == key_of(EncodedResponse((1, 2, 3)))
    assert {len(key_of(response)) for response in different} == {16}


def test_equal_responses_of_any_group_have_one_key() -> None:
    groups = [group([1], [2], [1]), group([3], [2])]
    assert list(positions_by_key(groups).values()) == [[(0, 0), (0, 2)], [(0, 1), (1, 1)], [(1, 0)]]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_an_invalid_size_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="reward_cache_mib"):
        Settings.load(reward_cache_mib=value)
