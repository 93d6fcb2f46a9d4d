"""The packing plan against a brute-force twin: what each token of a row sees must be what it would see alone."""

from __future__ import annotations

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
    plan = plan_row(batch, share_prefix=share)
    members = [member for group in batch for member in group]
    assert len(plan.leaves) == len(members)
    for leaf, member, last in zip(plan.leaves, members, plan.last, strict=True):
        indices = visible(plan, leaf)
        assert [plan.ids[index] for index in indices] == member
        assert [plan.position_ids[index] for index in indices] == list(range(len(member)))
        assert indices[-1] == last


@given(groups)
def test_the_row_holds_each_shared_prefix_once_and_nothing_else_twice(batch: list[list[list[int]]]) -> None:
    plan = plan_row(batch, share_prefix=True)
    assert len(plan.ids) == sum(cost(group, share_prefix=True) for group in batch)
    assert len(plan.ids) == sum(run.length for run in plan.runs)
    covered = [index for run in plan.runs for index in range(run.start, run.start + run.length)]
    assert covered == list(range(len(plan.ids)))


@given(groups)
def test_without_sharing_every_response_is_a_root_of_its_own(batch: list[list[list[int]]]) -> None:
    plan = plan_row(batch, share_prefix=False)
    assert all(run.parent == ROOT for run in plan.runs)
    assert len(plan.ids) == sum(len(member) for group in batch for member in group)


@given(st.lists(tokens, min_size=1, max_size=6))
def test_the_shared_prefix_is_the_longest_that_leaves_each_member_a_token(group: list[list[int]]) -> None:
    assert shared_prefix(group) == brute_force_prefix(group)


def test_a_plan_by_hand() -> None:
    plan = plan_row([[[7, 8, 1], [7, 8, 2, 3]], [[5]]], share_prefix=True)
    assert plan.ids == [7, 8, 1, 2, 3, 5]
    assert plan.position_ids == [0, 1, 2, 2, 3, 0]
    assert [(run.start, run.length, run.parent, run.offset) for run in plan.runs] == [
        (0, 2, ROOT, 0),
        (2, 1, 0, 2),
        (3, 2, 0, 2),
        (5, 1, ROOT, 0),
    ]
    assert plan.last == [2, 4, 5]


def test_equal_responses_keep_one_token_each() -> None:
    plan = plan_row([[[1, 2, 3], [1, 2, 3]]], share_prefix=True)
    assert plan.ids == [1, 2, 3, 3]
    assert plan.last == [2, 3]


@given(groups, st.integers(1, 3))
def test_groups_that_start_alike_share_it_and_read_back_their_own_tokens(
    batch: list[list[list[int]]], share_from: int
) -> None:
    plan = plan_row(batch, share_prefix=True, share_from=share_from)
    members = [member for group in batch for member in group]
    for leaf, member in zip(plan.leaves, members, strict=True):
        indices = visible(plan, leaf)
        assert [plan.ids[index] for index in indices] == member
        assert [plan.position_ids[index] for index in indices] == list(range(len(member)))
    assert len(plan.ids) <= sum(cost(group, share_prefix=True) for group in batch)
    assert sum(plan.costs) == len(plan.ids)
    assert all(run.length > 0 and run.parent < index for index, run in enumerate(plan.runs))


@given(st.lists(tokens, min_size=1, max_size=8))
def test_responses_sent_one_by_one_share_every_prefix_of_a_radix_tree(sequences: list[list[int]]) -> None:
    plan = plan_row([[sequence] for sequence in sequences], share_prefix=True, share_from=1)
    # Each response keeps its last token; what comes before is in the row once, whoever starts with it.
    heads = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence))}
    assert len(plan.ids) == len(heads) + len(sequences)


def test_two_requests_with_one_system_prompt_by_hand() -> None:
    plan = plan_row([[[1, 1, 2, 7], [1, 1, 2, 8]], [[3, 4]], [[1, 1, 5, 9]]], share_prefix=True, share_from=2)
    assert plan.ids == [1, 1, 2, 7, 8, 5, 9, 3, 4]
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
    assert len(plan_row(apart, share_prefix=True).runs) == 2
    together = [[[*template, 5, 1, 2]], [[*template, 5, 3, 4]]]
    assert len(plan_row(together, share_prefix=True).runs) == 3
