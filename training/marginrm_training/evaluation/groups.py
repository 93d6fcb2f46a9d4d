"""Candidate groups -> rewards beside gold qualities, for Best-of-N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from marginrm.calibration import Floats
from marginrm.encoding import EncodedResponse
from marginrm.errors import DataError
from marginrm.preferences import CandidateGroup, read_groups
from marginrm.reward_model import RewardModel
from marginrm_training.evaluation.best_of_n import BestOfNPoint, best_of_n_curve, curve_end

UNSCORED = -math.inf  # sentinel for candidates over the model's limit: never picked, never reported as a reward


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """Rewards and gold qualities of candidates, by prompt and in the candidates' order.

    Attributes:
        rewards: The model's rewards; `UNSCORED` for candidates that alone are over the model's limit.
        gold: The data's gold qualities.
        lengths: Lengths in characters.
        truncated: Number of candidates whose prompt was cut to fit.
    """

    rewards: list[list[float]]
    gold: list[list[float]]
    lengths: list[list[int]]
    truncated: int

    def summary(self) -> str:
        """Returns one line for people."""
        rewards = [reward for group in self.rewards for reward in group]
        return (
            f"{len(self.rewards):,} prompts, {len(rewards):,} candidates; {self.truncated:,} with a cut prompt, "
            f"{rewards.count(UNSCORED):,} too long for the model, which therefore never picks them"
        )

    def curve(self) -> list[BestOfNPoint]:
        """Returns the Best-of-N curve; raises as `best_of_n_curve` does."""
        return best_of_n_curve(self.rewards, self.gold, self.lengths)

    def curve_end(self, points: Sequence[BestOfNPoint]) -> str | None:
        """Returns a sentence on where the curve ends early and why; None if it does not."""
        return curve_end(points, self.gold)

    def picks(self) -> Floats:
        """Returns the gold quality of the pick among all candidates of each prompt, [prompts]."""
        return _quality_of_highest(self.rewards, self.gold)

    def pick_metrics(self) -> dict[str, float]:
        """Returns the mean quality of the pick, beside a random, the longest and the best candidate's, and counts."""
        rewards = [reward for group in self.rewards for reward in group]
        return {
            "prompts": float(len(self.gold)),
            "pick": float(self.picks().mean()),
            "random": float(np.mean([np.mean(gold) for gold in self.gold])),
            "longest": float(_quality_of_highest(self.lengths, self.gold).mean()),
            "oracle": float(np.mean([max(gold) for gold in self.gold])),
            "truncated": float(self.truncated),
            "unusable": float(rewards.count(UNSCORED)),
        }


def load_groups(path: str | Path) -> list[CandidateGroup]:
    """Reads candidate groups with gold qualities.

    Raises:
        DataError: The file cannot be read, has no group, or a group has no gold qualities.
    """
    groups = list(read_groups(path))
    if not groups:
        raise DataError(f"{path}: has no group of candidates; the file is empty.")
    for group in groups:
        _gold(group)
    return groups


def score_groups(model: RewardModel, groups: Sequence[CandidateGroup]) -> ScoredGroups:
    """Scores every candidate that fits the model, cutting prompts from the left where that makes one fit.

    The other candidates count as never picked: leaving them out would make the task easier for this model alone.

    Raises:
        DataError: A group has no gold qualities.
    """
    gold = [_gold(group) for group in groups]
    encoded: list[list[EncodedResponse]] = []
    places: list[list[int]] = []
    for group in groups:
        outcomes = model.encoder.encode_group(group.prompt, group.candidates, "prompt_left")
        kept = [(index, found) for index, found in enumerate(outcomes) if isinstance(found, EncodedResponse)]
        places.append([index for index, _ in kept])
        encoded.append([found for _, found in kept])
    with tqdm(total=sum(len(group) for group in encoded), desc="scoring", unit="response") as bar:
        scored = model.score_encoded(encoded, progress=bar.update)
    rewards = [[UNSCORED] * len(group.candidates) for group in groups]
    for row, indices, values in zip(rewards, places, scored, strict=True):
        for index, value in zip(indices, values, strict=True):
            row[index] = value
    return ScoredGroups(
        rewards,
        gold,
        [[len(candidate) for candidate in group.candidates] for group in groups],
        sum(response.truncated for group in encoded for response in group),
    )


def _quality_of_highest(scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> Floats:
    """Returns the gold quality of the candidate with the highest score, the first of equal ones, [prompts]."""
    return np.array([truth[int(np.argmax(group))] for group, truth in zip(scores, gold, strict=True)])


def _gold(group: CandidateGroup) -> list[float]:
    if group.gold is None:
        raise DataError(f"{group.source}: the candidates have no gold quality (win_prob, gold or quality).")
    return list(group.gold)
