"""Target margins: estimators and filters by hand, and faults that silently make the method plain Bradley-Terry."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from marginrm.errors import ConfigError
from marginrm_training.method.margins import (
    PRESETS,
    MarginMethod,
    Reference,
    RunningMean,
    check_reference_batch,
    named,
    strengths_to_margins,
    target_margins,
)

D = torch.tensor([0.0, 1.0, 2.0, 5.0])  # mean 2, population standard deviation sqrt(3.5)
REFERENCE = Reference.of(D)


def margins(method: MarginMethod, given: torch.Tensor | None = None) -> list[float]:
    return target_margins(method, D, REFERENCE, given).margins.tolist()


def test_the_reference_is_mean_deviation_and_count() -> None:
    assert (REFERENCE.mean, REFERENCE.pairs) == (2.0, 4)
    assert REFERENCE.std == pytest.approx(math.sqrt(3.5))


def test_presets_by_hand() -> None:
    assert margins(PRESETS["bt"]) == [0, 0, 0, 0]
    assert margins(PRESETS["margin_unfiltered"]) == [2, 2, 2, 2]
    assert margins(PRESETS["paper"]) == [2, 2, 0, 0]  # strictly below the mean
    assert margins(PRESETS["margin"]) == [1, 1, 0, 0]  # capped
    targets = target_margins(PRESETS["paper"], D, REFERENCE)
    assert (targets.fired, targets.mean) == (0.5, 1.0)


def test_other_estimators_by_hand() -> None:
    assert margins(MarginMethod(estimator="fixed", fixed=0.5)) == [0.5] * 4
    assert margins(MarginMethod(estimator="deficit")) == [2, 1, 0, 0]
    expected = [math.exp((2 - x) / math.sqrt(3.5)) for x in D.tolist()]
    assert margins(MarginMethod(estimator="zscore_exp")) == pytest.approx(expected)
    assert margins(MarginMethod(estimator="column"), torch.tensor([1.0, 2.0, 0.0, 3.0])) == [1, 2, 0, 3]


CHOSEN = torch.tensor([3.0, 0.0, 1.0, 2.0, 2.0])
REJECTED = torch.tensor([1.0, 2.5, -4.0, 0.0, 1.0])
POOL = replace(Reference.of(CHOSEN - REJECTED), pool=torch.stack([CHOSEN, REJECTED]))


def test_transport_is_the_optimal_assignment_of_chosen_to_rejected_rewards() -> None:
    """By brute force: of all ways to join the two sides, the one with the smallest sum of squared differences."""
    chosen, rejected = CHOSEN.tolist(), REJECTED.tolist()
    best = min(
        itertools.permutations(rejected),
        key=lambda joined: sum((a - b) ** 2 for a, b in zip(chosen, joined, strict=True)),
    )
    d = CHOSEN - REJECTED
    method = MarginMethod(estimator="transport")
    found = target_margins(method, d, POOL, chosen=CHOSEN).margins
    by_quantile = sorted(zip(chosen, best, strict=True))
    expected = {a: max(a - b, 0.0) for a, b in by_quantile if chosen.count(a) == 1}
    assert {a: m for a, m in zip(chosen, found.tolist(), strict=True) if chosen.count(a) == 1} == pytest.approx(
        expected
    )
    assert target_margins(PRESETS["aplot"], d, POOL, chosen=CHOSEN).margins.max() <= 1
    distinct = CHOSEN + torch.arange(5) / 100
    pool = replace(POOL, pool=torch.stack([distinct, distinct - 0.3]))
    shifted = target_margins(method, torch.full((5,), 0.3), pool, chosen=distinct).margins
    assert shifted.tolist() == pytest.approx([0.3] * 5)  # the plan of a shift is the shift
    own = target_margins(method, d[:2], POOL, chosen=CHOSEN[:2]).margins  # one rank's pairs of the same batch
    assert own.tolist() == found[:2].tolist()


def test_small_margins_get_the_weights_of_sampling_by_them() -> None:
    d = CHOSEN - REJECTED
    weights = target_margins(PRESETS["mars"], d, POOL).margins
    assert float(weights.mean()) == pytest.approx(1)
    scale = sum(abs(x) for x in d.tolist()) / 5
    odds = [math.exp(-abs(x) / scale) for x in d.tolist()]
    assert (weights / 5).tolist() == pytest.approx([one / sum(odds) for one in odds])
    drawn = torch.multinomial(weights / 5, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.softplus(-d)
    assert float(losses[drawn].mean()) == pytest.approx(float((weights * losses).mean()), rel=0.02)


def test_estimators_of_a_whole_batch_need_one() -> None:
    for preset in ("aplot", "mars"):
        with pytest.raises(ConfigError, match=r"too few: raise `train_batch` .* to 8 or more[.]"):
            check_reference_batch(replace(PRESETS[preset], ema=0.9), 7)
        check_reference_batch(PRESETS[preset], 8)


@pytest.mark.parametrize(("c", "fired"), [(-1.0, 0.25), (0.0, 0.5), (1.0, 0.75), (5.0, 1.0)])
def test_the_threshold_moves_by_standard_deviations(c: float, fired: float) -> None:
    assert target_margins(named("paper", threshold_std=c), D, REFERENCE).fired == fired


def test_graded_labels_become_llama_2s_margins() -> None:
    strengths = torch.tensor([0.99, 0.85, 0.7, 0.55])
    assert strengths_to_margins(strengths, PRESETS["llama2_large"].grades).tolist() == [3, 2, 1, 0]
    assert margins(PRESETS["llama2_small"], strengths) == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_a_method_that_reads_the_data_needs_its_column() -> None:
    with pytest.raises(ConfigError, match="no 'strength'"):
        margins(PRESETS["scaled_bt"])


def test_trap_a_negative_mean_does_not_relax_the_loss() -> None:
    d = torch.tensor([-3.0, -1.0])
    assert target_margins(PRESETS["paper"], d, Reference.of(d)).margins.tolist() == [0, 0]


def test_trap_a_reference_batch_of_one_never_fires_and_is_refused() -> None:
    d = torch.tensor([0.7])
    assert target_margins(PRESETS["paper"], d, Reference.of(d)).fired == 0
    with pytest.raises(ConfigError, match="train_batch"):
        check_reference_batch(PRESETS["paper"], 7)
    check_reference_batch(PRESETS["paper"], 8)
    check_reference_batch(PRESETS["bt"], 1)
    check_reference_batch(named("paper", ema=0.9), 1)


def test_the_running_mean_has_no_bias_towards_zero() -> None:
    running = RunningMean(0.9)
    assert running.update(3.0) == pytest.approx(3.0)
    assert running.update(3.0) == pytest.approx(3.0)
    assert running.update(0.0) < 3.0


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Choose one of: bt,"):
        named("margins")
