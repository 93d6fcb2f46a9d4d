"""Candidate groups -> rewards beside gold qualities, for Best-of-N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from marginrm.encoding import EncodedResponse
from marginrm.errors import DataError
from marginrm.preferences import CandidateGroup
from marginrm.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """For each usable prompt, its candidates in order.

    Attributes:
        rewards: The model's rewards.
        gold: The data's gold qualities.
        lengths: Lengths in characters.
        truncated: Candidates whose prompt was cut to fit.
        too_long: Candidates left out because they alone are over the model's limit.
    """

    rewards: list[list[float]]
    gold: list[list[float]]
    lengths: list[list[int]]
    truncated: int
    too_long: int

    def summary(self) -> str:
        """Returns one line for people."""
        count = sum(len(group) for group in self.rewards)
        return (
            f"{len(self.rewards):,} prompts, {count:,} candidates; {self.truncated:,} with a cut prompt, "
            f"{self.too_long:,} left out as too long for the model"
        )


def score_groups(model: RewardModel, groups: Sequence[CandidateGroup]) -> ScoredGroups:
    """Scores every candidate that fits the model, cutting prompts from the left where that makes one fit.

    Raises:
        DataError: A group has no gold qualities.
    """
    encoded: list[list[EncodedResponse]] = []
    gold: list[list[float]] = []
    lengths: list[list[int]] = []
    too_long = 0
    for group in groups:
        if group.gold is None:
            raise DataError(f"{group.source}: the candidates have no gold quality (win_prob, gold or quality).")
        outcomes = model.encoder.encode_group(group.prompt, group.candidates, "prompt_left")
        kept = [(index, found) for index, found in enumerate(outcomes) if isinstance(found, EncodedResponse)]
        too_long += len(outcomes) - len(kept)
        encoded.append([found for _, found in kept])
        gold.append([group.gold[index] for index, _ in kept])
        lengths.append([len(group.candidates[index]) for index, _ in kept])
    with tqdm(total=sum(len(group) for group in encoded), desc="scoring", unit="response") as bar:
        rewards = model.score_encoded(encoded, progress=bar.update)
    truncated = sum(response.truncated for group in encoded for response in group)
    return ScoredGroups(rewards, gold, lengths, truncated, too_long)
