"""Running one step on the model, and keeping a fault to the responses that cause it.

A forward pass that raises, or that gives NaN or infinity anywhere, is run again in halves until what is at fault is
alone. That response gets an error in place of its reward; all others get the reward they would have had.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from marginrm.errors import MarginRMError, NonFiniteRewardError
from marginrm.packing import plan_row
from marginrm_service.engine.job import Group, Outcome
from marginrm_service.errors import ForwardFailedError

_log = logging.getLogger(__name__)

Forward = Callable[[Sequence[Group]], list[float]]


class ForwardModel(Protocol):
    """The part of `RewardModel` that the engine uses."""

    @property
    def forward_path(self) -> str:
        """`packed` or `padded`."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a group shares is computed once."""

    @property
    def token_budget(self) -> int:
        """The most tokens that a step computes."""

    def forward(self, groups: Sequence[Group]) -> list[float]:
        """Returns one reward per response, in order."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step.

    Attributes:
        outcomes: For each group one outcome per response.
        computed: For each group the tokens that were computed for it.
        faults: Forward passes that raised or gave a reward that is no number.
    """

    outcomes: list[list[Outcome]]
    computed: list[int]
    faults: int


def run_step(model: ForwardModel, groups: Sequence[Group]) -> StepResult:
    """Scores the groups of one step.

    A packed model takes them in one forward pass. For a padded one, responses of like length go together, so that no
    forward pass computes more than the budget, padding included.

    Args:
        model: The model.
        groups: Encoded responses, at least one per group.

    Returns:
        One outcome per response; this function itself raises only what is no `Exception`.
    """
    run = _Isolating(model.forward)
    if model.forward_path == "padded":
        outcomes, computed = _run_padded(run, groups, model.token_budget)
    else:
        outcomes = regroup(run(groups), groups)
        ids = [[member.ids for member in group] for group in groups]
        computed = list(plan_row(ids, share_prefix=model.shares_prefixes).costs)
    return StepResult(outcomes, computed, run.faults)


class _Isolating:
    """A forward pass that gives an error for a response at fault, and never raises."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._logged: set[int] = set()
        self.faults = 0

    def __call__(self, groups: Sequence[Group]) -> list[Outcome]:
        responses = sum(len(group) for group in groups)
        found = self._attempt(groups, responses)
        if not isinstance(found, MarginRMError):
            return found
        self.faults += 1
        if responses == 1:
            return [found]
        return [outcome for half in halves(groups) for outcome in self(half)]

    def _attempt(self, groups: Sequence[Group], responses: int) -> list[Outcome] | MarginRMError:
        """Returns the rewards, or what to say to a lone response.

        After running out of memory the halves need the room of the tensors that the traceback holds: it is emptied.
        """
        try:
            rewards = self._forward(groups)
            if len(rewards) != responses:
                raise RuntimeError(f"the model gave {len(rewards)} rewards for {responses} responses")
        except Exception as error:  # noqa: BLE001 - whatever torch raises, see the docstring above
            self._log(responses, error)
            traceback.clear_frames(error.__traceback__)
            return ForwardFailedError("The model could not compute this text.")
        if all(map(math.isfinite, rewards)):
            return list(rewards)
        return NonFiniteRewardError("The model gave no finite reward for this text.")

    def _log(self, responses: int, error: Exception) -> None:
        """Logs the first failure of a step and its first lone one: a broken device would fail for each of thousands."""
        kind = min(responses, 2)
        if kind in self._logged:
            return
        self._logged.add(kind)
        if responses > 1:
            _log.warning("A forward pass over %d responses failed; they are tried in halves", responses, exc_info=error)
        else:
            _log.error("A forward pass failed for a single response", exc_info=error)


def halves(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Cuts groups into two lists with half of the responses each (the second has one more if the number is odd)."""
    wanted = sum(len(group) for group in groups) // 2
    first: list[Group] = []
    second: list[Group] = []
    for group in groups:
        cut = min(wanted, len(group))
        wanted -= cut
        if cut:
            first.append(group[:cut])
        if cut < len(group):
            second.append(group[cut:])
    return first, second


def regroup(flat: Sequence[Outcome], groups: Sequence[Group]) -> list[list[Outcome]]:
    """Gives a flat list the groups' shape."""
    outcomes = iter(flat)
    return [[next(outcomes) for _ in group] for group in groups]


def padded_chunks(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cuts responses into rectangles of at most `budget` tokens, padding included.

    Args:
        lengths: Tokens of each response.
        budget: The most tokens of a rectangle; a longer response gets one to itself.

    Yields:
        Indices into `lengths`, longest responses first.
    """
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if chunk and lengths[chunk[0]] * (len(chunk) + 1) > budget:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _run_padded(run: _Isolating, groups: Sequence[Group], budget: int) -> tuple[list[list[Outcome]], list[int]]:
    places = [(number, index) for number, group in enumerate(groups) for index in range(len(group))]
    responses = [groups[number][index] for number, index in places]
    flat: list[Outcome] = [0.0] * len(places)
    computed = [0] * len(groups)
    for chunk in padded_chunks([len(response.ids) for response in responses], budget):
        outcomes = run([[responses[index]] for index in chunk])
        for index, outcome in zip(chunk, outcomes, strict=True):
            flat[index] = outcome
            computed[places[index][0]] += len(responses[chunk[0]].ids)
    return regroup(flat, groups), computed
