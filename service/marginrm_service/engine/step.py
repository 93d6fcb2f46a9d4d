"""Runs one step. If it fails, it is bisected until the failing responses are isolated; all others keep their rewards."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marginrm.encoding import EncodedGroup
from marginrm.errors import MarginRMError, NonFiniteRewardError
from marginrm.steps import PrefixUse, StepResult
from marginrm_service.engine.job import Outcome
from marginrm_service.errors import ForwardFailedError, UnavailableError

_log = logging.getLogger(__name__)


class ForwardModel(Protocol):
    """The part of `RewardModel` that the engine uses."""

    @property
    def token_budget(self) -> int:
        """Tokens that a step computes at most."""

    def run_step(self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None] | None = None) -> StepResult:
        """Returns one reward per response, and the tokens computed for each group."""

    def cached_tokens(self, ids: NDArray[np.int32], tenant: str | None) -> int:
        """Returns how many first tokens of a sequence need not be computed now. Called from any thread."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The result of a step.

    Attributes:
        outcomes: For each group one outcome per response.
        computed: For each group the tokens that were computed for it.
        faults: Runs that raised an error or gave a reward that is not finite.
        prefixes: What was taken from the prefix cache.
    """

    outcomes: list[list[Outcome]]
    computed: list[int]
    faults: int
    prefixes: PrefixUse = field(default_factory=PrefixUse)


def run_step(
    model: ForwardModel, groups: Sequence[EncodedGroup], tenants: Sequence[str | None] | None = None
) -> StepOutcome:
    """Scores the groups of one step; a response at fault gets an error in place of its reward.

    Args:
        model: The model.
        groups: Encoded responses, at least one per group.
        tenants: For each group the name under which its prefixes are read and kept; None for a group, or for all, neither
            reads nor keeps.

    Returns:
        One outcome per response. Only a `BaseException` that is not an `Exception` is raised, and:

    Raises:
        UnavailableError: The model cannot compute anything now.
    """
    isolation = _Isolation(model, tenants or [None] * len(groups))
    isolation.run(list(enumerate(groups)))
    return StepOutcome(isolation.outcomes, isolation.computed, isolation.faults, isolation.prefixes)


class _Isolation:
    """The outcomes of a step while it is run, whole or in halves."""

    def __init__(self, model: ForwardModel, tenants: Sequence[str | None]) -> None:
        self._model = model
        self._tenants = tenants
        self._logged: set[bool] = set()
        self.outcomes: list[list[Outcome]] = [[] for _ in tenants]
        self.computed = [0] * len(tenants)
        self.prefixes = PrefixUse()
        self.faults = 0

    def run(self, numbered: Sequence[tuple[int, EncodedGroup]]) -> None:
        """Runs groups, each with its number in the step; their outcomes come in order."""
        responses = sum(len(group) for _, group in numbered)
        found = self._attempt(numbered, responses)
        if isinstance(found, StepResult):
            for (number, _), rewards, computed in zip(numbered, found.rewards, found.computed, strict=True):
                self.outcomes[number] += rewards
                self.computed[number] += computed
            self.prefixes += found.prefixes
            return
        self.faults += 1
        if responses == 1:
            ((number, group),) = numbered
            self.outcomes[number].append(found)
            self.computed[number] += group[0].tokens
            return
        for half in halves(numbered):
            self.run(half)

    def _attempt(self, numbered: Sequence[tuple[int, EncodedGroup]], responses: int) -> StepResult | MarginRMError:
        """Returns the rewards, or the error that a lone response gets."""
        groups = [group for _, group in numbered]
        try:
            result = self._model.run_step(groups, [self._tenants[number] for number, _ in numbered])
            if [len(rewards) for rewards in result.rewards] != [len(group) for group in groups]:
                found = sum(map(len, result.rewards))
                raise RuntimeError(f"the model gave {found} rewards for {responses} responses")
        except UnavailableError:
            raise  # no text is at fault, so halves would fare no better
        except Exception as error:  # noqa: BLE001 - torch raises errors of any class
            self._log(error, lone=responses == 1)
            # Out of memory: the halves need the tensors' memory, which the traceback's frames hold.
            traceback.clear_frames(error.__traceback__)
            return ForwardFailedError("The model could not compute this text.")
        if all(math.isfinite(reward) for rewards in result.rewards for reward in rewards):
            return result
        return NonFiniteRewardError("The model gave no finite reward for this text.")

    def _log(self, error: Exception, *, lone: bool) -> None:
        """Logs a step's first failure and its first lone one: a broken device would fail for each of thousands."""
        if lone in self._logged:
            return
        self._logged.add(lone)
        if lone:
            _log.error("A forward pass failed for a single response", exc_info=error)
        else:
            _log.warning("A forward pass failed; its responses are tried in halves", exc_info=error)


def halves(
    numbered: Sequence[tuple[int, EncodedGroup]],
) -> tuple[list[tuple[int, EncodedGroup]], list[tuple[int, EncodedGroup]]]:
    """Splits numbered groups into two lists with half of the responses each; an odd one goes into the second."""
    wanted = sum(len(group) for _, group in numbered) // 2
    first: list[tuple[int, EncodedGroup]] = []
    second: list[tuple[int, EncodedGroup]] = []
    for number, group in numbered:
        cut = min(wanted, len(group))
        wanted -= cut
        if cut:
            first.append((number, group[:cut]))
        if cut < len(group):
            second.append((number, group[cut:]))
    return first, second
