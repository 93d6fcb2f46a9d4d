"""Temperatures of choices among N: a known truth is recovered, derivatives agree with differences, chance is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.confidence.uncertain_reward import UncertainReward, margin_std, widened
from marginrm.errors import CalibrationError
from marginrm.group_calibration import (
    _best_loss,
    _pick_loss,
    calibrate_groups,
    chance_error,
    draw,
    fit,
    measure,
    predict,
)
from marginrm.ranking import rank


def luce_groups(temperature: float, prompts: int = 200, size: int = 16) -> tuple[list[list[float]], list[list[float]]]:
    """Groups whose best candidate follows Luce's choice: gold is reward / T plus Gumbel noise (Yellott 1977)."""
    generator = np.random.default_rng(1)
    rewards = generator.normal(0, 4, (prompts, size))
    gold = rewards / temperature + generator.gumbel(size=(prompts, size))
    return rewards.tolist(), gold.tolist()


def noisy_groups(prompts: int, seed: int, size: int = 32) -> tuple[list[list[float]], list[list[float]]]:
    """Groups whose rewards are the gold quality plus noise with heavy tails, which the maximum selects."""
    generator = np.random.default_rng(seed)
    gold = generator.normal(size=(prompts, size))
    return (gold + generator.standard_t(3, (prompts, size))).tolist(), gold.tolist()


def test_the_temperature_of_luce_choices_is_recovered_for_every_n() -> None:
    found = calibrate_groups(*luce_groups(1.7), temperature=1.0)
    assert found.temperature.temperature == pytest.approx(1.7, rel=0.12)
    assert found.temperature.of_pick(16) == pytest.approx(1.7, rel=0.25)
    assert found.temperature.of_best(16) == pytest.approx(1.7, rel=0.12)
    assert found.temperature.largest == 16
    assert [one.n for one in found.by_n] == [2, 4, 8, 16]
    for one in found.by_n:
        assert one.ece <= one.chance + 0.03
        assert one.p_best_ece <= one.chance + 0.05
        assert sum(row.count for row in one.reliability) == one.sets


def test_chosen_maxima_need_another_temperature_than_given_pairs_where_noise_has_heavy_tails() -> None:
    fitted = calibrate_groups(*noisy_groups(100, seed=0), temperature=1.5).temperature
    assert fitted.pick_slope > 0.3
    errors = []
    for choices in draw(*noisy_groups(100, seed=1), draws=1).values():  # prompts that were not used to fit
        given = GroupTemperature(temperature=fitted.temperature, pick_slope=0, best_slope=0, largest=2)
        errors.append(measure(choices, predict(choices, given), predict(choices, fitted)))
    for one in errors[-2:]:  # N = 16 and 32
        assert one.ece < one.ece_before / 2


@pytest.mark.parametrize("uncertain", [False, True])
def test_gradients_are_those_of_differences(uncertain: bool) -> None:
    rewards, gold = luce_groups(1.3, prompts=25, size=8)
    if uncertain:
        generator = np.random.default_rng(0)
        rewards = [[UncertainReward(one, generator.normal(size=5).tolist(), 0.5) for one in group] for group in rewards]
    draws = draw(rewards, gold, draws=2)
    for loss, at in ((_pick_loss, np.array([0.2, -0.1])), (lambda x, d: _best_loss(x, 0.2, d), np.array([0.3]))):
        _, gradient, information = loss(at, draws)
        for axis in range(len(at)):
            step = np.zeros(len(at))
            step[axis] = 1e-5
            slope = (loss(at + step, draws)[0] - loss(at - step, draws)[0]) / 2e-5
            assert gradient[axis] == pytest.approx(slope, rel=1e-4)
        assert np.all(np.linalg.eigvalsh(information) > 0)


def test_no_neighbour_of_the_fit_is_more_likely() -> None:
    draws = draw(*noisy_groups(40, seed=2, size=8))
    fitted = fit(draws)
    at = np.array([math.log(fitted.temperature), fitted.pick_slope])
    lowest = _pick_loss(at, draws)[0]
    for step in ([0.05, 0], [-0.05, 0], [0, 0.05], [0, -0.05], [0.05, -0.05], [-0.05, 0.05]):
        assert _pick_loss(at + step, draws)[0] > lowest


def test_predictions_are_those_of_a_ranking() -> None:
    generator = np.random.default_rng(3)
    rewards = [
        [UncertainReward(one, generator.normal(size=4).tolist(), 0.5) for one in group]
        for group in generator.normal(size=(20, 4))
    ]
    temperatures = GroupTemperature(temperature=0.8, pick_slope=0.4, best_slope=-0.2, largest=4)
    choices = draw(rewards, generator.normal(size=(20, 4)).tolist(), draws=1)[4]
    pick, best = predict(choices, temperatures)
    for index, prompt in enumerate(choices.prompt):
        ranked = rank(rewards[prompt], 1.0, groups=temperatures)
        assert ranked.confidence_from == "groups"
        assert ranked.confidence == pytest.approx(pick[index])
        assert ranked.ranking[0].p_best == pytest.approx(best[index])
        assert sum(one.p_best for one in ranked.ranking) == pytest.approx(1)


def test_for_two_candidates_p_best_is_the_confidence() -> None:
    temperatures = GroupTemperature(temperature=0.8, pick_slope=0.4, best_slope=-0.2, largest=4)
    two = [UncertainReward(1.0, [0.5, 0.0], 0.5), UncertainReward(0.4, [0.0, 0.7], 0.5)]
    ranked = rank(two, groups=temperatures)
    std = math.sqrt(0.5**2 + 0.7**2)
    assert margin_std(*two) == pytest.approx(std)
    expected = 1 / (1 + math.exp(-0.6 / math.sqrt(0.64 + math.pi / 8 * std**2)))
    assert ranked.ranking[0].p_best == pytest.approx(expected)
    assert ranked.confidence == pytest.approx(expected)


def test_a_widened_temperature_integrates_over_the_margin() -> None:
    """MacKay's approximation against the integral itself, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for margin, std, temperature in ((0.5, 1.0, 1.0), (2.0, 1.5, 0.7), (0.3, 0.2, 2.0)):
        exact = float(np.sum(weights / (1 + np.exp(-(margin + std * nodes) / temperature))) / np.sum(weights))
        assert 1 / (1 + math.exp(-margin / widened(temperature, std))) == pytest.approx(exact, abs=0.015)


def test_above_the_largest_n_the_temperature_stays() -> None:
    temperatures = GroupTemperature(temperature=2.0, pick_slope=0.5, best_slope=-0.5, largest=8)
    assert [temperatures.of_pick(n) for n in (1, 2, 8, 100)] == pytest.approx([2, 2, 4, 4])
    assert [temperatures.of_best(n) for n in (2, 8, 100)] == pytest.approx([2, 1, 1])


def test_chance_alone_shows_an_error() -> None:
    # One bin, n fair coins: mean |share - 1/2| is sqrt(1 / (2 pi n)).
    assert chance_error(np.full(400, 0.5), rounds=2000) == pytest.approx(math.sqrt(1 / (2 * math.pi * 400)), rel=0.05)


def test_few_prompts_are_refused() -> None:
    with pytest.raises(CalibrationError, match="Only 7 prompts have two candidates or more"):
        calibrate_groups(*luce_groups(1.0, prompts=7), temperature=1.0)
