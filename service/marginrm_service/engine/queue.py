"""Which part of the waiting work goes into the next forward pass. Pure: no thread, no clock, no torch.

Jobs take turns. In one turn a job puts in whole groups of up to a *quantum* of tokens, and one group at least. Groups
stay whole, since each part of a group computes its prompt again; only a group that no step can hold is cut, and then
a turn takes a slice of a quantum. A step that begins with such a slice has room for its prompt besides, so that few
steps compute it again. Turns go round until the step is full, but no second time if the step completes a
job, which would have to wait for it. Where one job was completed beside another that goes on, more short ones are to be
expected, so the next step has no second round either: who comes while it runs waits for a short one. A job that was
served goes behind those that came in while the step ran. So a lone pair is in the next step, and that step is short,
however many candidates another request has left; and that other request still gets its turn in every step.

Bulk jobs stand in a line of their own, which gets the room that the interactive line leaves, and every fourth step goes
first: interactive work hardly feels bulk work, and bulk work never starves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from marginrm.steps import part_room
from marginrm_service.engine.job import Job

QUANTA_PER_STEP = 4
BULK_FIRST_EVERY = 4  # steps


@dataclass(slots=True)
class Portion:
    """Members `start` to `stop` (exclusive) of one group of a job, which go into one step together."""

    job: Job
    group: int
    start: int
    stop: int


class FairQueue:
    """Jobs that wait, and whose turn it is.

    Args:
        budget: The most tokens that a step may compute, but for the prompt of a group that is cut and comes first. A
            single response above it gets a step to itself.
    """

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ValueError(f"budget = {budget}: a step computes at least 1 token.")
        self._budget = budget
        self._quantum = max(budget // QUANTA_PER_STEP, 1)
        self._interactive = _Line()
        self._bulk = _Line()
        self._steps = 0
        self._brief = False  # whether the next step has one round only

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    def push(self, job: Job) -> None:
        """Adds a job behind those of its class that wait, and before those that the last step served."""
        if not job.taken:
            (self._bulk if job.bulk else self._interactive).waiting.append(job)

    def clear(self) -> list[Job]:
        """Empties the queue and returns what was in it."""
        return [*self._interactive.clear(), *self._bulk.clear()]

    def take(self) -> list[Portion]:
        """Returns the next step; empty only if no job waits. Abandoned jobs are dropped on the way."""
        step = _Step(self._budget, self._quantum, one_round=self._brief)
        self._steps += 1
        bulk_first = self._steps % BULK_FIRST_EVERY == 0
        for line in (self._bulk, self._interactive) if bulk_first else (self._interactive, self._bulk):
            line.fill(step)
        self._brief = step.completes_a_job and (self._interactive.goes_on or self._bulk.goes_on)
        return step.portions


class _Line:
    """Jobs of one class, and whose turn it is."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self._served: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self._served)

    @property
    def goes_on(self) -> bool:
        """Whether a job of the last step has work left."""
        return bool(self._served)

    def clear(self) -> list[Job]:
        jobs = [*self.waiting, *self._served]
        self.waiting.clear()
        self._served.clear()
        return jobs

    def fill(self, step: _Step) -> None:
        """Gives turns until the step is full, or completes a job after everybody had one."""
        rounds = 0
        while self._take_round(step):
            rounds += 1
        if rounds:  # who waits now had a turn in an earlier round
            self._served.extendleft(reversed(self.waiting))
            self.waiting.clear()

    def _take_round(self, step: _Step) -> bool:
        """Gives each job a turn; returns whether another round may follow."""
        self.waiting.extend(self._served)
        self._served.clear()
        while self.waiting:
            job = self.waiting[0]
            if not job.abandoned and not step.take_turn(job):
                return False
            self.waiting.popleft()
            if not job.taken and not job.abandoned:
                self._served.append(job)
        return bool(self._served) and not step.one_round


class _Step:
    """A step while it is being filled."""

    def __init__(self, budget: int, quantum: int, *, one_round: bool) -> None:
        self.portions: list[Portion] = []
        self.completes_a_job = False
        self.one_round = one_round
        self._budget = budget
        self._quantum = quantum
        self._room = budget
        self._open: dict[tuple[int, int], Portion] = {}

    def take_turn(self, job: Job) -> bool:
        """Puts in what one turn of a job allows.

        Returns:
            Whether anything went in; if not, the step is full as far as this job is concerned.
        """
        allowance = self._quantum
        took = False
        while not job.taken:
            members, cost = self._fitting(job, allowance, first=not took)
            if not members:
                break
            self._put(job, members, cost)
            allowance -= cost
            took = True
        if job.taken:
            self.completes_a_job = self.one_round = True
        return took

    def _fitting(self, job: Job, allowance: int, *, first: bool) -> tuple[int, int]:
        """Returns how many of the current group's next members may go in now, and what they cost."""
        plan = job.plans[job.group]
        if plan.cost <= self._budget:
            fits = plan.cost <= self._room and (first or plan.cost <= allowance)
            return (len(plan.lengths), plan.cost) if fits else (0, 0)
        if not self.portions:
            self._room = part_room(self._budget, plan.shared)
        prompt = 0 if (id(job), job.group) in self._open else plan.shared
        members = own = 0
        for index in range(job.member, len(plan.lengths)):
            grown = own + plan.lengths[index] - plan.shared
            # A turn has room for one member, and an empty step for any: there is always progress.
            turn_over = grown > allowance and not (first and not members)
            step_full = prompt + grown > self._room and bool(members or self.portions)
            if turn_over or step_full:
                break
            members, own = members + 1, grown
        return members, prompt + own if members else 0

    def _put(self, job: Job, members: int, cost: int) -> None:
        key = (id(job), job.group)
        if key in self._open:
            self._open[key].stop += members
        else:
            self._open[key] = Portion(job, job.group, job.member, job.member + members)
            self.portions.append(self._open[key])
        job.advance(members)
        self._room -= cost
