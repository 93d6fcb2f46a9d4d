"""Groups with gold qualities -> temperatures for choices among N candidates, and the quality of their confidences.

Sets of N = 2, 4, 8, ... candidates are drawn from each held-out prompt, and the one with the highest reward is chosen, as
in serving. Two events are predicted: the chosen one beats the runner-up, and the chosen one is the best of all. Each
prompt counts once for each N, however many sets it gave: they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marginrm.calibration import BINS, T_MAX, T_MIN, Floats, bins_of, error_of, sigmoid
from marginrm.confidence.group_temperature import GroupTemperature, log_ratio
from marginrm.confidence.uncertain_reward import margin_std
from marginrm.errors import CalibrationError
from marginrm.manifest import GroupCalibration, GroupMeasure

SIZES = (2, 4, 8, 16, 32, 64)
FEWEST_PROMPTS = 20  # with so many candidates; fewer say little about that N
_DRAWS = 8  # partitions of each prompt's candidates to fit on; the first one is measured
_FOLDS = 5
_SLOPE_STD = 1.0  # of the prior on a slope, which is normal around 0: no change with N
_STEPS = 60

_Evaluate = Callable[[Floats], tuple[float, Floats, Floats]]  # parameters to loss, gradient, Fisher information


@dataclass(frozen=True, slots=True)
class Choices:
    """Sets of candidates, each with the chosen one first and the others by falling reward.

    Attributes:
        prompt: Index of each set's prompt, [sets].
        lead: Reward of the chosen one minus each candidate's, [sets, n].
        std: Standard deviations of these margins, [sets, n]; 0 for a model without.
        gold: Gold qualities, [sets, n].
    """

    prompt: NDArray[np.int64]
    lead: Floats
    std: Floats
    gold: Floats

    @property
    def n(self) -> int:
        """Number of candidates of each set."""
        return int(self.lead.shape[1])

    @property
    def beats(self) -> Floats:
        """1 where the chosen one beats the runner-up, 0.5 where they are equal, [sets]."""
        first, second = self.gold[:, 0], self.gold[:, 1]
        return np.where(first == second, 0.5, (first > second).astype(np.float64))

    @property
    def best(self) -> Floats:
        """Share of each candidate in being the best: equal ones share, [sets, n]."""
        highest = (self.gold == self.gold.max(axis=1, keepdims=True)).astype(np.float64)
        shares: Floats = highest / highest.sum(axis=1, keepdims=True)
        return shares

    @property
    def weight(self) -> Floats:
        """Weights that give each prompt one vote, [sets]."""
        return 1.0 / np.bincount(self.prompt)[self.prompt]

    def of(self, prompts: NDArray[np.bool_]) -> Choices:
        """Returns the sets of some prompts, given as a mask over prompts."""
        kept = prompts[self.prompt]
        return Choices(self.prompt[kept], self.lead[kept], self.std[kept], self.gold[kept])


def calibrate_groups(
    rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], temperature: float, seed: int = 0
) -> GroupCalibration:
    """Fits the temperatures of choices, and measures them by cross-fitting over prompts.

    Args:
        rewards: For each held-out prompt the candidates' rewards, which may carry their uncertainty; finite.
        gold: For each prompt their gold qualities.
        temperature: T of given pairs, which is measured beside it.
        seed: Of the sets that are drawn.

    Raises:
        CalibrationError: Fewer than 20 prompts have two candidates.
    """
    prompts = len(rewards)
    draws = draw(rewards, gold, seed=seed)
    if not draws:
        usable = sum(len(group) > 1 for group in rewards)
        raise CalibrationError(
            f"Only {usable} prompts have two candidates or more; a calibration of choices needs {FEWEST_PROMPTS}."
        )
    fold = np.arange(prompts) % _FOLDS
    fitted = [fit(_without(draws, fold == number)) for number in range(_FOLDS)]
    measured = draw(rewards, gold, seed=seed, draws=1)
    given = GroupTemperature(temperature=temperature, pick_slope=0.0, best_slope=0.0, largest=2)
    return GroupCalibration(
        temperature=fit(draws),
        prompts=len({int(prompt) for choices in draws.values() for prompt in choices.prompt}),
        by_n=[_measure(choices, fold, fitted, given) for choices in measured.values()],
    )


def draw(
    rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], *, seed: int = 0, draws: int = _DRAWS
) -> dict[int, Choices]:
    """Draws sets of each size for which there are prompts enough: random partitions of each prompt's candidates.

    Args:
        rewards: As for `calibrate_groups`.
        gold: As for `calibrate_groups`.
        seed: Of the partitions.
        draws: Number of partitions of each prompt.

    Returns:
        Sets by their size.
    """
    generator = np.random.default_rng(seed)
    orders = [[generator.permutation(len(group)) for _ in range(draws)] for group in rewards]
    found = {}
    for n in SIZES:
        if sum(len(group) >= n for group in rewards) < FEWEST_PROMPTS:
            break
        sets = [
            (prompt, order[start : start + n])
            for prompt, partitions in enumerate(orders)
            for order in partitions
            for start in range(0, len(order) - n + 1, n)
        ]
        found[n] = _choices(sets, rewards, gold)
    return found


def _choices(
    sets: Sequence[tuple[int, NDArray[np.int64]]], rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]
) -> Choices:
    lead, std, quality = [], [], []
    for prompt, members in sets:
        ranked = sorted(sorted(members), key=lambda member: -rewards[prompt][member])
        first = rewards[prompt][ranked[0]]
        lead.append([first - rewards[prompt][member] for member in ranked])
        std.append([margin_std(first, rewards[prompt][member]) or 0.0 for member in ranked])
        quality.append([gold[prompt][member] for member in ranked])
    return Choices(np.array([prompt for prompt, _ in sets]), np.array(lead), np.array(std), np.array(quality))


def fit(draws: Mapping[int, Choices]) -> GroupTemperature:
    """Fits log T = log T_2 + slope log(N / 2), by maximum likelihood with a prior that holds slopes near 0.

    T_2 and the slope of the pick come from the events "the chosen one beats the runner-up" (Bernoulli), the other slope
    from "this candidate is the best" (Luce's choice).

    Args:
        draws: Sets by their size.
    """
    start, pick_slope = _minimum(lambda at: _pick_loss(at, draws), np.zeros(2))
    (best_slope,) = _minimum(lambda at: _best_loss(at, start, draws), np.zeros(1))
    return GroupTemperature(
        temperature=math.exp(start), pick_slope=pick_slope, best_slope=best_slope, largest=max(draws)
    )


def _pick_loss(at: Floats, draws: Mapping[int, Choices]) -> tuple[float, Floats, Floats]:
    loss, gradient, information = _prior(at, slope=1)
    for n, choices in draws.items():
        along = np.array([1.0, log_ratio(n)])
        t = math.exp(float(at @ along))
        logits, rate = _scaled(choices.lead[:, 1], choices.std[:, 1], t)
        p, weight = sigmoid(logits), choices.weight
        loss += float(np.sum(weight * (np.logaddexp(0.0, -logits) + (1 - choices.beats) * logits)))
        gradient += float(np.sum(weight * (p - choices.beats) * rate)) * along
        information += float(np.sum(weight * p * (1 - p) * rate**2)) * np.outer(along, along)
    return loss, gradient, information


def _best_loss(at: Floats, start: float, draws: Mapping[int, Choices]) -> tuple[float, Floats, Floats]:
    loss, gradient, information = _prior(at, slope=0)
    for n, choices in draws.items():
        along = log_ratio(n)
        logits, rate = _scaled(-choices.lead, choices.std, math.exp(start + float(at[0]) * along))
        p, best, weight = _softmax(logits), choices.best, choices.weight
        loss -= float(np.sum(weight * np.sum(best * np.log(np.maximum(p, 1e-300)), axis=1)))
        gradient += float(np.sum(weight * np.sum((p - best) * rate, axis=1))) * along
        mean = np.sum(p * rate, axis=1, keepdims=True)
        information += float(np.sum(weight * np.sum(p * (rate - mean) ** 2, axis=1))) * along**2
    return loss, gradient, information


def _scaled(margins: Floats, std: Floats, temperature: float) -> tuple[Floats, Floats]:
    """Returns margins over their widened temperature, and the derivative of that by log T."""
    wide = temperature**2 + math.pi / 8 * std**2
    logits: Floats = margins / np.sqrt(wide)
    return logits, -logits * temperature**2 / wide


def _prior(at: Floats, *, slope: int) -> tuple[float, Floats, Floats]:
    """Returns loss, gradient and information of the prior: vague on log T, normal around 0 on the slope."""
    precision = np.full(len(at), 1e-6)
    precision[slope] = 1 / _SLOPE_STD**2
    return float(precision @ at**2) / 2, precision * at, np.diag(precision)


def _minimum(evaluate: _Evaluate, at: Floats) -> Floats:
    """Minimises a loss by Fisher scoring; a step that does not lower it is halved."""
    loss, gradient, information = evaluate(at)
    for _ in range(_STEPS):
        step = np.clip(np.linalg.solve(information, gradient), -1.0, 1.0)
        while True:
            tried = at - step
            tried[0] = np.clip(tried[0], math.log(T_MIN), math.log(T_MAX))
            found = evaluate(tried)
            if found[0] <= loss or np.max(np.abs(step)) < 1e-7:
                break
            step = step / 2
        if np.max(np.abs(tried - at)) < 1e-7:
            break
        at, (loss, gradient, information) = tried, found
    return at


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _without(draws: Mapping[int, Choices], left_out: NDArray[np.bool_]) -> dict[int, Choices]:
    return {n: choices.of(~left_out) for n, choices in draws.items()}


def predict(choices: Choices, temperatures: GroupTemperature) -> tuple[Floats, Floats]:
    """Returns P(the chosen one beats the runner-up) and P(it is the best of all) of each set, each [sets]."""
    pick, _ = _scaled(choices.lead[:, 1], choices.std[:, 1], temperatures.of_pick(choices.n))
    logits, _ = _scaled(-choices.lead, choices.std, temperatures.of_best(choices.n))
    return sigmoid(pick), _softmax(logits)[:, 0]


def _measure(
    choices: Choices, fold: NDArray[np.int64], fitted: Sequence[GroupTemperature], given: GroupTemperature
) -> GroupMeasure:
    """Measures sets of one size, each with the temperatures that were fitted without its prompt."""
    before = predict(choices, given)
    after = np.stack([np.stack(predict(choices, one)) for one in fitted])  # [folds, 2, sets]
    pick, best = after[fold[choices.prompt], :, np.arange(len(choices.prompt))].T
    return measure(choices, before, (pick, best))


def measure(choices: Choices, before: tuple[Floats, Floats], after: tuple[Floats, Floats]) -> GroupMeasure:
    """Compares predictions of two kinds with what came true.

    Args:
        choices: Sets of one size.
        before: As `predict` returns them, with the temperature of given pairs.
        after: The same with temperatures of groups.
    """
    beats, best = choices.beats, choices.best[:, 0]
    reliability, p_best_reliability = bins_of(after[0], beats), bins_of(after[1], best)
    return GroupMeasure(
        n=choices.n,
        prompts=len(np.unique(choices.prompt)),
        sets=len(choices.prompt),
        accuracy=float(beats.mean()),
        ece_before=error_of(bins_of(before[0], beats)),
        ece=error_of(reliability),
        chance=chance_error(after[0]),
        best_share=float(best.mean()),
        p_best_ece_before=error_of(bins_of(before[1], best)),
        p_best_ece=error_of(p_best_reliability),
        reliability=reliability,
        p_best_reliability=p_best_reliability,
    )


def chance_error(sure: Floats, rounds: int = 200) -> float:
    """Returns the mean ECE of events that happen with exactly the given probabilities: what sampling alone explains."""
    happened = np.random.default_rng(0).random((rounds, len(sure))) < sure
    place = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    sums = (happened - sure) @ np.eye(BINS)[place]  # [rounds, bins]
    return float(np.abs(sums).sum(axis=1).mean() / len(sure))
