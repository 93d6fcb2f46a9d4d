"""Chooses the groups of the next forward pass. Pure: no thread, no clock, no torch.

Jobs are served round robin. In its turn a job may add groups of up to a *quantum* of tokens (a quarter of the step), and
at least one group. Groups are never split unless one alone exceeds the step, because each slice of a group computes its
prompt again; a turn then adds a slice of a quantum. A step that begins with such a slice has room for its prompt on top
of the budget, so that few steps compute it again.

Rounds repeat until the step is full, with two exceptions. A step that completes a job ends after that round, so that the
caller is not delayed. So does the step after it if another job continues, because more short jobs are likely. A job that
was served goes behind those that arrived while the step ran. So a single pair is in the next step, and that step is
short, however many candidates another request has left; and that other request still gets a turn in every step.

What a prefix cache has of a group does not count. It is looked up again in each step, since the steps fill it.

Bulk jobs are served in the room that interactive jobs leave, and go first in every fourth step. Interactive work is
hardly delayed by bulk work, and bulk work never starves.
"""

from __future__ import annotations

from collections import deque

from marginrm.steps import GroupSlice, part_room
from marginrm_service.engine.job import CachedTokens, Job

BULK_FIRST_EVERY = 4  # steps
_QUANTA_PER_STEP = 4

Step = list[tuple[Job, GroupSlice]]


def quantum(budget: int) -> int:
    """Returns the tokens that a job may add to a step in one turn, for a step of at most `budget` tokens."""
    return max(budget // _QUANTA_PER_STEP, 1)


class FairQueue:
    """The jobs that wait, and whose turn is next.

    Args:
        budget: The most tokens that a step may compute, apart from the prompt of a group that is cut and comes first. A
            single response above the budget gets a step to itself.
        cached_tokens: Looks a group up in a prefix cache; None without one.

    Raises:
        ValueError: The budget is below 1.
    """

    def __init__(self, budget: int, cached_tokens: CachedTokens | None = None) -> None:
        if budget < 1:
            raise ValueError(f"budget = {budget}: a step computes at least 1 token.")
        self._budget = budget
        self._cached_tokens = cached_tokens
        self._interactive = _RoundRobin()
        self._bulk = _RoundRobin()
        self._steps = 0
        self._single_round = False  # of the next step

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    @property
    def has_unfinished(self) -> bool:
        """Whether a job of the last step has work left."""
        return self._interactive.has_unfinished or self._bulk.has_unfinished

    def push(self, job: Job) -> None:
        """Adds a job behind the waiting jobs of its class and before those that the last step served."""
        if not job.fully_scheduled:
            (self._bulk if job.bulk else self._interactive).waiting.append(job)

    def clear(self) -> list[Job]:
        """Empties the queue and returns the jobs that were in it."""
        return [*self._interactive.clear(), *self._bulk.clear()]

    def take(self) -> Step:
        """Returns the next step; it is empty only if no job waits. Cancelled jobs are dropped on the way."""
        step = _OpenStep(self._budget, self._cached_tokens, single_round=self._single_round)
        self._steps += 1
        bulk_first = self._steps % BULK_FIRST_EVERY == 0
        for jobs in (self._bulk, self._interactive) if bulk_first else (self._interactive, self._bulk):
            jobs.fill(step)
        self._single_round = step.completes_a_job and self.has_unfinished
        return [(job, part) for (job, _), part in step.slices.items()]


class _RoundRobin:
    """The jobs of one class, in the order of their turns."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self._served: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self._served)

    @property
    def has_unfinished(self) -> bool:
        """Whether a job of the last step has work left."""
        return bool(self._served)

    def clear(self) -> list[Job]:
        jobs = [*self.waiting, *self._served]
        self.waiting.clear()
        self._served.clear()
        return jobs

    def fill(self, step: _OpenStep) -> None:
        """Gives turns until the step is full, or until the end of a round in which it completes a job."""
        rounds = 0
        while self._take_round(step):
            rounds += 1
        if rounds:  # the jobs in `waiting` had a turn in an earlier round
            self._served.extendleft(reversed(self.waiting))
            self.waiting.clear()

    def _take_round(self, step: _OpenStep) -> bool:
        """Gives each job a turn; returns whether another round may follow."""
        self.waiting.extend(self._served)
        self._served.clear()
        while self.waiting:
            job = self.waiting[0]
            if not job.cancelled and not step.take_turn(job):
                return False
            self.waiting.popleft()
            if not job.fully_scheduled and not job.cancelled:
                self._served.append(job)
        return bool(self._served) and not step.single_round


class _OpenStep:
    """A step while it is filled."""

    def __init__(self, budget: int, cached_tokens: CachedTokens | None, *, single_round: bool) -> None:
        self.slices: dict[tuple[Job, int], GroupSlice] = {}  # by job and index of the group
        self.completes_a_job = False
        self.single_round = single_round
        self._budget = budget
        self._cached_tokens = cached_tokens
        self._room = budget

    def take_turn(self, job: Job) -> bool:
        """Adds as much as one turn of a job allows.

        Returns:
            Whether anything was added; if not, the step has no room for this job.
        """
        allowance = quantum(self._budget)
        took = False
        while not job.fully_scheduled:
            members, cost = self._fitting(job, allowance, first=not took)
            if not members:
                break
            self._add(job, members, cost)
            allowance -= cost
            took = True
        if job.fully_scheduled:
            self.completes_a_job = self.single_round = True
        return took

    def _fitting(self, job: Job, allowance: int, *, first: bool) -> tuple[int, int]:
        """Returns how many of the current group's next members may be added now, and their cost."""
        plan = job.plans[job.group]
        if self._cached_tokens and (job, job.group) not in self.slices:
            job.look_up(job.group, self._cached_tokens)
        if plan.cost <= self._budget:
            fits = plan.cost <= self._room and (first or plan.cost <= allowance)
            return (len(plan.lengths), plan.cost) if fits else (0, 0)
        if not self.slices:
            self._room = part_room(self._budget, plan.prompt)
        prompt = 0 if (job, job.group) in self.slices else plan.prompt
        members = suffixes = 0
        for index in range(job.member, len(plan.lengths)):
            grown = suffixes + plan.lengths[index] - plan.common
            # A turn has room for one member, and an empty step for any, so there is always progress.
            turn_over = grown > allowance and not (first and not members)
            step_full = prompt + grown > self._room and bool(members or self.slices)
            if turn_over or step_full:
                break
            members, suffixes = members + 1, grown
        return members, prompt + suffixes if members else 0

    def _add(self, job: Job, members: int, cost: int) -> None:
        begun = self.slices.get((job, job.group))
        start = begun.start if begun else job.member
        self.slices[job, job.group] = GroupSlice(job.group, start, job.member + members)
        job.advance(members)
        self._room -= cost
