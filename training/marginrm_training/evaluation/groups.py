"""Candidate groups -> rewards beside gold qualities, for Best-of-N."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from marginrm.calibration import Floats
from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.encoding import EncodedResponse
from marginrm.errors import CalibrationError, DataError, EncodingError
from marginrm.group_calibration import calibrate_groups, draw, measure, predict
from marginrm.manifest import GroupCalibration, GroupMeasure
from marginrm.progress import progress_bar
from marginrm.ranking import averse
from marginrm.reward_model import RewardModel
from marginrm.texts.places import read_raw
from marginrm.texts.preferences import CandidateGroup, parse_group
from marginrm_training.data.excluded import ExcludedRows, MalformedRows
from marginrm_training.data.splits import EncodedPair, prompt_key
from marginrm_training.evaluation.best_of_n import BestOfNPoint, best_of_n_curve, curve_end

UNSCORED = -math.inf  # sentinel for candidates that the model cannot read: never picked, never reported as a reward


@dataclass(frozen=True, slots=True)
class Groups:
    """Candidate groups with gold qualities.

    Attributes:
        groups: The groups.
        excluded: The malformed rows.
    """

    groups: Sequence[CandidateGroup]
    excluded: ExcludedRows = field(default_factory=ExcludedRows)

    def first(self, limit: int | None) -> Groups:
        """Returns the first groups only."""
        return Groups(self.groups[:limit], self.excluded)

    def without_prompts_of(self, pairs: Sequence[EncodedPair]) -> Groups:
        """Returns the groups whose prompts are in none of these pairs; the others are counted as excluded."""
        seen = {prompt_key(pair.pair.prompt) for pair in pairs}
        excluded = ExcludedRows()
        excluded.update(self.excluded)
        kept = []
        for group in self.groups:
            if prompt_key(group.prompt) in seen:
                excluded.add("with a prompt of the training pairs", group.source)
            else:
                kept.append(group)
        return Groups(kept, excluded)


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """Rewards and gold qualities of candidates, by prompt and in the candidates' order.

    Attributes:
        rewards: The model's rewards; `UNSCORED` for candidates that the model cannot read.
        gold: The data's gold qualities.
        lengths: Lengths in characters.
        truncated: Number of candidates whose prompt was cut to fit.
        sources: `path:line` of each prompt.
        unscored: The candidates that the model cannot read, by reason, as `path:line candidate`.
        excluded: Prompts that are left out: malformed rows, and prompts of which no candidate can be read.
    """

    rewards: list[list[float]]
    gold: list[list[float]]
    lengths: list[list[int]]
    truncated: int
    sources: list[str]
    unscored: ExcludedRows = field(default_factory=ExcludedRows)
    excluded: ExcludedRows = field(default_factory=ExcludedRows)

    def summary(self) -> str:
        """Returns one line for people."""
        count = sum(map(len, self.rewards))
        text = f"{len(self.rewards):,} prompts, {count:,} candidates; {self.truncated:,} with a cut prompt"
        if self.unscored.total:
            text += f"; candidates that the model cannot read and therefore never picks: {self.unscored}"
        return f"{text}; prompts left out: {self.excluded}" if self.excluded.total else text

    def only(self, sources: Collection[str]) -> ScoredGroups:
        """Returns the prompts with these sources only; the counts stay those of the file."""
        kept = [index for index, source in enumerate(self.sources) if source in sources]
        return replace(
            self,
            rewards=[self.rewards[index] for index in kept],
            gold=[self.gold[index] for index in kept],
            lengths=[self.lengths[index] for index in kept],
            sources=[self.sources[index] for index in kept],
        )

    def averse(self, factor: float) -> ScoredGroups:
        """Returns these groups with each reward lowered by factor times its standard deviation; unchanged for a factor of 0.

        Raises:
            NoUncertaintyError: The factor is not 0, and the rewards carry no uncertainty.
        """
        if not factor:
            return self
        values = [
            [reward if reward == UNSCORED else averse([reward], factor)[0] for reward in group]
            for group in self.rewards
        ]
        return replace(self, rewards=values)

    def readable(self) -> tuple[list[list[float]], list[list[float]]]:
        """Returns rewards and gold qualities of the candidates that the model can read."""
        kept = [[index for index, reward in enumerate(group) if reward != UNSCORED] for group in self.rewards]
        rewards, gold = (
            [[group[index] for index in members] for group, members in zip(values, kept, strict=True)]
            for values in (self.rewards, self.gold)
        )
        return rewards, gold

    def calibrate(self, temperature: float) -> GroupCalibration:
        """Fits the temperatures of choices among these candidates.

        Args:
            temperature: T of given pairs.

        Raises:
            DataError: There are too few prompts with two readable candidates.
        """
        try:
            return calibrate_groups(*self.readable(), temperature)
        except CalibrationError as error:
            raise DataError(f"{self.sources[0].rpartition(':')[0]}: {error}") from error

    def confidences(self, temperatures: GroupTemperature) -> list[GroupMeasure]:
        """Returns the quality of the confidences of choices by N, for every N with 20 prompts or more."""
        found = draw(*self.readable(), draws=1)
        return [
            measure(choices, predicted, predicted)
            for choices, predicted in ((choices, predict(choices, temperatures)) for choices in found.values())
        ]

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


def groups_of(model: RewardModel) -> GroupTemperature:
    """Returns a model's temperatures for choices; those of given pairs if it has no others."""
    return model.info.groups or GroupTemperature(
        temperature=model.temperature, pick_slope=0.0, best_slope=0.0, largest=2
    )


def load_groups(path: str | Path, max_bad_rows: int | None = None) -> Groups:
    """Reads candidate groups with gold qualities. Malformed rows are counted by reason and left out.

    Args:
        path: A place, as for `marginrm.texts.places.files_of`.
        max_bad_rows: Most malformed rows, those without gold qualities included; None for any number, 0 to stop at the
            first.

    Raises:
        DataError: The file cannot be read, has no group, more rows are malformed than allowed, or all are.
    """
    malformed = MalformedRows(str(path), max_bad_rows)
    groups = []
    for row, source in read_raw(str(path), malformed):
        try:
            group = parse_group(row, source)
            _gold(group)
            groups.append(group)
        except DataError as error:
            malformed(error)
    malformed.check(len(groups))
    if not groups:
        raise DataError(f"{path}: has no group of candidates; the file is empty.")
    return Groups(groups, malformed.rows)


def score_groups(model: RewardModel, groups: Groups) -> ScoredGroups:
    """Scores every candidate that fits the model, cutting prompts from the left where that makes one fit.

    The other candidates count as never picked: leaving them out would make the task easier for this model alone. A
    prompt of which no candidate can be read is left out, since there is nothing to pick.

    Raises:
        DataError: A group has no gold qualities, or no candidate of any prompt can be read.
    """
    usable: list[CandidateGroup] = []
    encoded: list[dict[int, EncodedResponse]] = []
    unscored, excluded = ExcludedRows(), ExcludedRows()
    excluded.update(groups.excluded)
    for group in groups.groups:
        outcomes = model.encoder.encode_group(group.prompt, group.candidates, "prompt_left")
        kept = {index: found for index, found in enumerate(outcomes) if isinstance(found, EncodedResponse)}
        faults = {index: found.reason for index, found in enumerate(outcomes) if isinstance(found, EncodingError)}
        if not kept:
            excluded.add(f"without a readable candidate: {', '.join(sorted(set(faults.values())))}", group.source)
            continue
        for index, reason in faults.items():
            unscored.add(reason, f"{group.source} candidate {index}")
        usable.append(group)
        encoded.append(kept)
    if not usable:
        raise DataError(f"No candidate of any prompt can be read by this model: {excluded}.")
    with progress_bar("scoring", sum(map(len, encoded)), "response") as bar:
        scored = model.score_encoded([list(kept.values()) for kept in encoded], progress=bar.update)
    rewards = [[UNSCORED] * len(group.candidates) for group in usable]
    for row, kept, values in zip(rewards, encoded, scored, strict=True):
        for index, value in zip(kept, values, strict=True):
            row[index] = value
    return ScoredGroups(
        rewards,
        gold=[_gold(group) for group in usable],
        lengths=[[len(candidate) for candidate in group.candidates] for group in usable],
        truncated=sum(response.truncated for kept in encoded for response in kept.values()),
        sources=[group.source for group in usable],
        unscored=unscored,
        excluded=excluded,
    )


def _quality_of_highest(scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> Floats:
    """Returns the gold quality of the candidate with the highest score, the first of equal ones, [prompts]."""
    return np.array([truth[int(np.argmax(group))] for group, truth in zip(scores, gold, strict=True)])


def _gold(group: CandidateGroup) -> list[float]:
    if group.gold is None:
        raise DataError.of_row(
            group.source,
            "without gold qualities",
            "the candidates have no gold quality (win_prob, gold or quality), and there are no 'rewards'.",
        )
    return list(group.gold)
