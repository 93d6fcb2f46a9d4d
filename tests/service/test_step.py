"""One step on the model: rewards in their places, and faults with the responses that cause them."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm.errors import NonFiniteRewardError
from marginrm.steps import StepResult
from marginrm_service.engine.step import halves, run_step
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


def test_a_prefix_that_requests_share_is_counted_once():
    prompt = list(range(1, 41))
    result = run_step(FakeModel(), [group([*prompt, 50], [*prompt, 51]), group([*prompt, 52], [*prompt, 53])])
    assert result.computed == [42, 2]


@pytest.mark.parametrize("fault", ["poisoned", "nan_token"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_fault_stays_with_its_responses(fault, shared):
    model = FakeModel(shares_prefixes=shared, **{fault: BAD})
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
        def run_step(self, groups, tenants=None):
            result = super().run_step(groups, tenants)
            return StepResult([rewards[:-1] for rewards in result.rewards], result.computed)

    (outcomes,) = run_step(Forgetful(), [group([1], [2])]).outcomes
    assert [type(outcome) for outcome in outcomes] == [ForwardFailedError, ForwardFailedError]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_halves_are_even_and_keep_the_order(sizes):
    groups = [group(*([number, member] for member in range(size))) for number, size in enumerate(sizes)]
    first, second = halves(list(enumerate(groups)))
    flat = [(number, response) for number, members in (*first, *second) for response in members]
    assert flat == [(number, response) for number, members in enumerate(groups) for response in members]
    sizes = [sum(len(members) for _, members in half) for half in (first, second)]
    assert 0 <= sizes[1] - sizes[0] <= 1
    assert all(members for _, members in (*first, *second))
