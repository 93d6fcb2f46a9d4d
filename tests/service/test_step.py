"""One step on the model: rewards in their places, and faults with the responses that cause them."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm.errors import NonFiniteRewardError
from marginrm_service.engine.step import halves, padded_chunks, run_step
from marginrm_service.errors import ForwardFailedError
from support.service import FakeModel, group, reward_of, sized_group

BAD = 666


def test_a_packed_step_is_one_forward_with_the_cost_of_each_group():
    model = FakeModel()
    groups = [sized_group(10, 3, 4), sized_group(0, 5)]
    result = run_step(model, groups)
    assert result.outcomes == [[reward_of(member) for member in members] for members in groups]
    assert result.computed == [17, 5]
    assert (len(model.steps), result.faults) == (1, 0)


def test_what_requests_share_is_counted_once():
    prompt = list(range(1, 41))
    result = run_step(FakeModel(), [group([*prompt, 50], [*prompt, 51]), group([*prompt, 52], [*prompt, 53])])
    assert result.computed == [42, 2]


def test_a_padded_step_puts_like_lengths_together_and_counts_the_padding():
    model = FakeModel(token_budget=40, forward_path="padded", shares_prefixes=False)
    groups = [sized_group(0, 2, 20), sized_group(0, 2, 19), sized_group(0, 3)]
    result = run_step(model, groups)
    assert result.outcomes == [[reward_of(member) for member in members] for members in groups]
    assert sum(result.computed) == 2 * 20 + 3 * 3
    assert result.computed == [23, 23, 3]
    assert [sum(map(len, step)) for step in model.steps] == [2, 3]


@pytest.mark.parametrize("fault", ["poisoned", "nan_token"])
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_a_fault_stays_with_its_responses(fault, path):
    model = FakeModel(forward_path=path, shares_prefixes=path == "packed", **{fault: BAD})
    groups = [group([1, 2], [1, 3], [1, BAD]), group([4]), group([5, 6], [5, BAD], [5, 7], [5, 8])]
    result = run_step(model, groups)
    expected = ForwardFailedError if fault == "poisoned" else NonFiniteRewardError
    for members, outcomes in zip(groups, result.outcomes, strict=True):
        for member, outcome in zip(members, outcomes, strict=True):
            if BAD in member.ids:
                assert type(outcome) is expected
            else:
                assert outcome == reward_of(member)
    assert result.faults > 0


def test_the_log_says_what_the_model_raised(caplog):
    with caplog.at_level(logging.ERROR):
        run_step(FakeModel(poisoned=BAD), [group([BAD])])
    assert "the device says no" in caplog.text


def test_a_model_that_gives_too_few_rewards_is_at_fault():
    class Forgetful(FakeModel):
        def forward(self, groups):
            return super().forward(groups)[:-1]

    (outcomes,) = run_step(Forgetful(), [group([1], [2])]).outcomes
    assert [type(outcome) for outcome in outcomes] == [ForwardFailedError, ForwardFailedError]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_halves_are_even_and_keep_the_order(sizes):
    groups = [group(*([number, member] for member in range(size))) for number, size in enumerate(sizes)]
    first, second = halves(groups)
    flat = [response for members in (*first, *second) for response in members]
    assert flat == [response for members in groups for response in members]
    assert 0 <= sum(map(len, second)) - sum(map(len, first)) <= 1
    assert all([*first, *second])


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_padded_chunks_hold_each_response_once_and_keep_to_the_budget(lengths, budget):
    chunks = list(padded_chunks(lengths, budget))
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert max(lengths[index] for index in chunk) * len(chunk) <= budget or len(chunk) == 1
