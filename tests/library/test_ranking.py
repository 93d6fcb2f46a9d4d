"""Rankings, compared with numbers computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm.errors import NonFiniteRewardError
from marginrm.ranking import compare, confidence, rank, verdict


def test_confidence_is_the_sigmoid_of_margin_over_temperature() -> None:
    assert confidence(0.0) == 0.5
    assert confidence(math.log(3)) == pytest.approx(0.75)
    assert confidence(2 * math.log(3), 2.0) == pytest.approx(0.75)
    assert confidence(-1e6) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("margin", "tie_below", "expected"),
    [(0.0, 0.5, "tie"), (1e-9, 0.5, "chosen"), (-1.0, 0.5, "rejected"), (0.1, 0.55, "tie"), (0.3, 0.55, "chosen")],
)
def test_verdicts(margin: float, tie_below: float, expected: str) -> None:
    assert verdict(margin, 1.0, tie_below) == expected


def test_a_ranking_by_hand() -> None:
    ranking = rank([1.0, 3.0, 3.0, -1.0], top_k=2)
    assert [(entry.candidate, entry.rank) for entry in ranking.ranking] == [(1, 1), (2, 2)]
    assert ranking.best == 1
    assert ranking.margin == 0.0
    assert ranking.tie
    assert ranking.mean == 1.5
    assert ranking.std == pytest.approx(math.sqrt((0.25 + 2.25 + 2.25 + 6.25) / 4))
    total = math.e + 2 * math.e**3 + 1 / math.e
    assert ranking.ranking[0].p_best == pytest.approx(math.e**3 / total)


def test_one_candidate_has_no_margin() -> None:
    ranking = rank([2.0])
    assert (ranking.best, ranking.margin, ranking.confidence) == (0, None, None)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0.1, 10))
def test_probabilities_sum_to_one_and_order_is_by_reward_then_index(rewards: list[float], temperature: float) -> None:
    ranking = rank(rewards, temperature)
    assert sum(entry.p_best for entry in ranking.ranking) == pytest.approx(1)
    order = [entry.candidate for entry in ranking.ranking]
    assert order == sorted(range(len(rewards)), key=lambda index: (-rewards[index], index))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_reward_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteRewardError):
        compare(1.0, bad)
    with pytest.raises(NonFiniteRewardError):
        rank([1.0, bad])
