"""Candidate groups -> rewards beside gold qualities, for Best-of-N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from marginrm.encoding import EncodedResponse
from marginrm.errors import DataError
from marginrm.preferences import CandidateGroup, read_groups
from marginrm.reward_model import RewardModel

UNSCORED = -math.inf  # what a candidate that the model cannot read counts as in a race; never shown as a reward


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """For each usable prompt, its candidates in order.

    Attributes:
        rewards: The model's rewards; `UNSCORED` for candidates that alone are over the model's limit.
        gold: The data's gold qualities.
        lengths: Lengths in characters.
        truncated: Candidates whose prompt was cut to fit.
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


def load_groups(path: str | Path) -> list[CandidateGroup]:
    """Reads candidate groups that a curve can be made of.

    Raises:
        DataError: The file cannot be read, has no group, or a group has no gold qualities.
    """
    groups = list(read_groups(path))
    if not groups:
        raise DataError(f"{path}: has no group of candidates; it is empty.")
    for group in groups:
        _gold(group)
    return groups


def score_groups(model: RewardModel, groups: Sequence[CandidateGroup]) -> ScoredGroups:
    """Scores every candidate that fits the model, cutting prompts from the left where that makes one fit.

    The others stay in the race, unpicked: leaving them out would make the race easier for the model alone.

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


def _gold(group: CandidateGroup) -> list[float]:
    if group.gold is None:
        raise DataError(f"{group.source}: the candidates have no gold quality (win_prob, gold or quality).")
    return list(group.gold)
