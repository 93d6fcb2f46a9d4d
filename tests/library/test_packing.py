"""The packing plan against a brute-force twin: what each token of a row sees must be what it would see alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from marginrm.packing import ROOT, SHARE_FROM, PackingPlan, cost, plan_row, shared_prefix

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7)
groups = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=5)


def visible(plan: PackingPlan, leaf: int) -> list[int]:
    """Row indices of the whole sequence that ends in a leaf, by walking up the runs."""
    runs = [plan.runs[index] for index in (*plan.ancestors(leaf), leaf)]
    return [index for run in runs for index in range(run.start, run.start + run.length)]


def brute_force_prefix(group: list[list[int]]) -> int:
    length = 0
    while all(len(member) > length + 1 for member in group) and len({member[length] for member in group}) == 1:
        length += 1
    return length if len(group) > 1 else 0


@given(groups, st.booleans())
def test_every_response_reads_back_its_own_tokens_at_their_own_positions(
    batch: list[list[list[int]]], share: bool
) -> None:
    plan = plan_row(batch, causal=share)
    members = [member for group in batch for member in group]
    assert len(plan.leaves) == len(members)
    for leaf, member, last in zip(plan.leaves, members, plan.last, strict=True):
        indices = visible(plan, leaf)
        assert plan.ids[indices].tolist() == member
        assert plan.position_ids[indices].tolist() == list(range(len(member)))
        assert indices[-1] == last


@given(groups)
def test_the_row_holds_each_shared_prefix_once_and_nothing_else_twice(batch: list[list[list[int]]]) -> None:
    plan = plan_row(batch, causal=True)
    assert len(plan.ids) == sum(cost(group, share_prefix=True) for group in batch)
    assert len(plan.ids) == sum(run.length for run in plan.runs)
    covered = [index for run in plan.runs for index in range(run.start, run.start + run.length)]
    assert covered == list(range(len(plan.ids)))


@given(groups)
def test_without_sharing_every_response_is_a_root_of_its_own(batch: list[list[list[int]]]) -> None:
    plan = plan_row(batch, causal=False)
    assert all(run.parent == ROOT for run in plan.runs)
    assert len(plan.ids) == sum(len(member) for group in batch for member in group)


@given(st.lists(tokens, min_size=1, max_size=6))
def test_the_shared_prefix_is_the_longest_that_leaves_each_member_a_token(group: list[list[int]]) -> None:
    assert shared_prefix(group) == brute_force_prefix(group)


def test_a_plan_by_hand() -> None:
    plan = plan_row([[[7, 8, 1], [7, 8, 2, 3]], [[5]]], causal=True)
    assert plan.ids.tolist() == [7, 8, 1, 2, 3, 5]
    assert plan.position_ids.tolist() == [0, 1, 2, 2, 3, 0]
    assert [(run.start, run.length, run.parent, run.offset) for run in plan.runs] == [
        (0, 2, ROOT, 0),
        (2, 1, 0, 2),
        (3, 2, 0, 2),
        (5, 1, ROOT, 0),
    ]
    assert plan.last == [2, 4, 5]


def test_equal_responses_keep_one_token_each() -> None:
    plan = plan_row([[[1, 2, 3], [1, 2, 3]]], causal=True)
    assert plan.ids.tolist() == [1, 2, 3, 3]
    assert plan.last == [2, 3]


@given(groups, st.integers(1, 3))
def test_groups_that_start_alike_share_it_and_read_back_their_own_tokens(
    batch: list[list[list[int]]], share_from: int
) -> None:
    plan = plan_row(batch, causal=True, share_from=share_from)
    members = [member for group in batch for member in group]
    for leaf, member in zip(plan.leaves, members, strict=True):
        indices = visible(plan, leaf)
        assert plan.ids[indices].tolist() == member
        assert plan.position_ids[indices].tolist() == list(range(len(member)))
    assert len(plan.ids) <= sum(cost(group, share_prefix=True) for group in batch)
    assert sum(plan.costs) == len(plan.ids)
    assert all(run.length > 0 and run.parent < index for index, run in enumerate(plan.runs))


@given(st.lists(tokens, min_size=1, max_size=8))
def test_responses_sent_one_by_one_share_every_prefix_of_a_radix_tree(sequences: list[list[int]]) -> None:
    plan = plan_row([[sequence] for sequence in sequences], causal=True, share_from=1)
    # Each response keeps its last token; what comes before is in the row once, whoever starts with it.
    heads = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence))}
    assert len(plan.ids) == len(heads) + len(sequences)


def test_two_requests_with_one_system_prompt_by_hand() -> None:
    plan = plan_row([[[1, 1, 2, 7], [1, 1, 2, 8]], [[3, 4]], [[1, 1, 5, 9]]], causal=True, share_from=2)
    assert plan.ids.tolist() == [1, 1, 2, 7, 8, 5, 9, 3, 4]
    assert [(run.length, run.parent, run.offset) for run in plan.runs] == [
        (2, ROOT, 0),
        (1, 0, 2),
        (1, 1, 3),
        (1, 1, 3),
        (2, 0, 2),
        (2, ROOT, 0),
    ]
    assert plan.last == [3, 4, 8, 6]
    assert plan.costs == (5, 2, 2)


def test_a_few_common_tokens_are_not_worth_sharing_between_groups() -> None:
    template = [5] * (SHARE_FROM - 1)
    apart = [[[*template, 1, 2]], [[*template, 3, 4]]]
    assert len(plan_row(apart, causal=True).runs) == 2
    together = [[[*template, 5, 1, 2]], [[*template, 5, 3, 4]]]
    assert len(plan_row(together, causal=True).runs) == 3


@given(groups, st.booleans(), st.integers(1, 16))
def test_a_row_is_filled_to_a_multiple_without_a_response_that_sees_the_filler(
    batch: list[list[list[int]]], causal: bool, multiple: int
) -> None:
    bare, filled = (plan_row(batch, causal=causal, multiple=number) for number in (1, multiple))
    tokens = len(bare.ids)
    assert 0 <= len(filled.ids) - tokens < multiple
    assert len(filled.ids) % multiple == 0
    assert (filled.leaves, filled.costs, filled.runs[: len(bare.runs)]) == (bare.leaves, bare.costs, bare.runs)
    assert filled.ids[:tokens].tolist() == bare.ids.tolist()
    assert (filled.filler is None) == (len(filled.ids) == tokens)
    assert filled.position_ids[tokens:].tolist() == [0] * (len(filled.ids) - tokens)
    assert all(filled.filler not in {leaf, *filled.ancestors(leaf)} for leaf in filled.leaves)


@given(groups, st.booleans())
def test_first_and_last_are_the_bounds_of_each_response(batch: list[list[list[int]]], causal: bool) -> None:
    plan = plan_row(batch, causal=causal)
    assert plan.first == [visible(plan, leaf)[0] for leaf in plan.leaves]
    assert plan.last == [visible(plan, leaf)[-1] for leaf in plan.leaves]


def test_arrays_and_tuples_make_the_same_plan() -> None:
    tuples = [[(7, 8, 1), (7, 8, 2, 3)], [(5,)]]
    arrays = [[np.array(member, np.int32) for member in group] for group in tuples]
    assert (
        plan_row(arrays, causal=True).ids.tolist() == plan_row(tuples, causal=True).ids.tolist() == [7, 8, 1, 2, 3, 5]
    )
    assert shared_prefix(arrays[0]) == shared_prefix(tuples[0]) == 2
