"""The fair queue: the groups that it chooses for each step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm_service.engine.job import Job
from marginrm_service.engine.queue import BULK_FIRST_EVERY, FairQueue, Step
from support.service import sized_group


def job(*groups: tuple[int, list[int]]) -> Job:
    return Job.of([sized_group(shared, *own) for shared, own in groups], share_prefix=True)


def positions(step: Step, names: dict[Job, str]) -> set[tuple[str, int, int]]:
    return {(names[job], part.group, member) for job, part in step for member in range(part.start, part.stop)}


def drain(queue: FairQueue) -> list[Step]:
    steps = []
    while step := queue.take():
        steps.append(step)
    return steps


def test_everything_goes_together_while_it_fits():
    queue = FairQueue(100)
    pairs = [job((10, [5, 5])) for _ in range(5)]  # 20 tokens each
    for pair in pairs:
        queue.push(pair)
    (step,) = drain(queue)
    assert [job for job, _ in step] == pairs
    assert [(part.group, part.start, part.stop) for _, part in step] == [(0, 0, 2)] * 5


def test_a_group_that_fits_a_step_is_never_cut():
    queue = FairQueue(100)
    queue.push(job((10, [40, 40])))  # 90
    queue.push(job((10, [40, 40])))
    assert [[(part.start, part.stop) for _, part in step] for step in drain(queue)] == [[(0, 2)], [(0, 2)]]


def test_each_slice_of_a_cut_group_has_a_budget_of_responses_on_top_of_its_prompt():
    queue = FairQueue(100)
    queue.push(job((20, [10] * 25)))
    assert [[(part.start, part.stop) for _, part in step] for step in drain(queue)] == [
        [(0, 11)],
        [(11, 22)],
        [(22, 25)],
    ]


def test_a_slice_with_a_prompt_above_the_budget_has_as_many_tokens_of_responses():
    queue = FairQueue(100)
    queue.push(job((200, [10] * 30)))
    assert [[(part.start, part.stop) for _, part in step] for step in drain(queue)] == [[(0, 20)], [(20, 30)]]


def test_a_cut_group_after_another_fills_the_rest_of_the_step():
    queue = FairQueue(100)
    queue.push(job((10, [5, 5]), (20, [10] * 25)))
    assert [(part.group, part.start, part.stop) for _, part in queue.take()] == [(0, 0, 2), (1, 0, 6)]


def test_a_response_above_the_budget_has_a_step_to_itself():
    queue = FairQueue(100)
    queue.push(job((0, [10])))
    queue.push(job((0, [500])))
    queue.push(job((0, [10])))
    assert [len(step) for step in drain(queue)] == [1, 1, 1]


def test_a_single_pair_is_in_the_next_step_behind_a_huge_request():
    queue = FairQueue(100)
    huge = job((20, [10] * 10_000))
    queue.push(huge)
    queue.take()
    pair = job((10, [5, 5]))
    queue.push(pair)
    step = queue.take()
    assert [(job is pair, part.stop - part.start) for job, part in step] == [(True, 2), (False, 2)]


def test_the_step_after_a_completed_pair_is_short_too():
    queue = FairQueue(100)
    queue.push(job((20, [10] * 10_000)))
    queue.take()
    queue.push(job((10, [5, 5])))
    queue.take()
    assert [part.stop - part.start for _, part in queue.take()] == [2]  # one turn
    assert [part.stop - part.start for _, part in queue.take()] == [11]  # no other job has arrived: a full one


def test_jobs_that_arrive_one_after_another_have_full_steps():
    queue = FairQueue(100)
    for _ in range(3):
        queue.push(job((20, [10] * 8)))
        assert [part.stop - part.start for _, part in queue.take()] == [8]


def test_a_huge_request_is_served_while_small_ones_keep_arriving():
    queue = FairQueue(100)
    huge = job(*[(10, [5, 5])] * 50)
    queue.push(huge)
    steps = 0
    while not huge.fully_scheduled:
        steps += 1
        for _ in range(4):  # all but a fifth of each step
            queue.push(job((10, [5, 5])))
        queue.take()
    assert steps <= 50


def test_cancelled_jobs_are_dropped_at_their_turn():
    queue = FairQueue(100)
    gone, here = job((10, [5, 5])), job((10, [5, 5]))
    queue.push(gone)
    queue.push(here)
    gone.cancelled = True
    assert [job for job, _ in queue.take()] == [here]
    assert len(queue) == 0


def test_clear_returns_the_unfinished_jobs():
    queue = FairQueue(100)
    jobs = [job((10, [5] * 30)), job((10, [5, 5]))]
    for each in jobs:
        queue.push(each)
    queue.take()
    assert queue.clear() == [jobs[0]]
    assert queue.take() == []


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="budget = 0"):
        FairQueue(0)


groups = st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8))
jobs = st.lists(groups, min_size=1, max_size=4)


class Twin:
    """The rule of the module's docstring, the slow way: one response at a time, costs counted anew each time."""

    def __init__(self, budget: int) -> None:
        self.budget, self.quantum = budget, max(budget // 4, 1)
        self.room = budget
        self.specs: dict[str, list[tuple[int, list[int]]]] = {}
        self.line: list[str] = []
        self.todo: dict[str, list[tuple[int, int]]] = {}
        self.last_step: list[str] = []
        self.brief = False

    def push(self, name: str, spec: list[tuple[int, list[int]]]) -> None:
        spec = [(shared if len(own) > 1 else 0, own if len(own) > 1 else [shared + own[0]]) for shared, own in spec]
        self.specs[name] = spec
        self.line.append(name)
        self.todo[name] = [(g, m) for g, (_, own) in enumerate(spec) for m in range(len(own))]

    def cost(self, taken: set[tuple[str, int, int]]) -> int:
        specs = self.specs
        prompts = {(name, g) for name, g, _ in taken}
        return sum(specs[name][g][0] for name, g in prompts) + sum(specs[name][g][1][m] for name, g, m in taken)

    def take(self) -> set[tuple[str, int, int]]:
        step: set[tuple[str, int, int]] = set()
        self.room = self.budget
        line = [name for name in self.line if self.todo[name]]
        arrived = [name for name in line if name not in self.last_step]
        line = arrived + [name for name in self.last_step if name in line]
        self.last_step = []
        turns = dict.fromkeys(line, 0)
        full = completed = False
        rounds = 0
        while not full and not completed and any(self.todo[name] for name in line) and not (self.brief and rounds):
            rounds += 1
            for name in [name for name in line if self.todo[name]]:
                full = not self.turn(name, step)
                if full:
                    break
                turns[name] += 1
            completed = not all(self.todo[name] for name in line)
        had = {name for name, _, _ in step}
        rest = [name for name in line if self.todo[name]]
        self.last_step = sorted((n for n in rest if n in had), key=lambda n: (turns[n], line.index(n)))
        self.line = [name for name in rest if name not in had]
        self.line += self.last_step
        self.brief = completed and bool(self.last_step)
        return step

    def turn(self, name: str, step: set[tuple[str, int, int]]) -> bool:
        spec = self.specs[name]
        spent, took = 0, False
        while self.todo[name]:
            g, m = self.todo[name][0]
            shared, own = spec[g]
            whole = shared + sum(own)
            if whole <= self.budget:
                unit = {(name, g, i) for i in range(len(own))}
                if self.cost(step | unit) > self.room or (took and spent + whole > self.quantum):
                    break
                step |= unit
                self.todo[name] = self.todo[name][len(own) :]
                spent, took = spent + whole, True
                continue
            if not step:  # a cut group comes first: its prompt is on top
                self.room = shared + max(self.budget + min(self.budget // 8, shared), shared)
            before, members = self.cost(step), 0
            while self.todo[name] and self.todo[name][0][0] == g:
                m = self.todo[name][0][1]
                first = not took and not members
                sliced = sum(own[m - members : m + 1])
                if spent + sliced > self.quantum and not first:
                    break
                if step and self.cost(step | {(name, g, m)}) > self.room:
                    break
                step.add((name, g, m))
                self.todo[name].pop(0)
                members += 1
            if not members:
                break
            spent, took = spent + self.cost(step) - before, True
        return took


@given(st.lists(jobs, min_size=1, max_size=6), st.integers(20, 120), st.data())
def test_steps_are_those_of_the_brute_force_twin(specs, budget, data):
    queue, twin = FairQueue(budget), Twin(budget)
    names: dict[Job, str] = {}
    pending = list(enumerate(specs))
    total: list[tuple[str, int, int]] = []
    while pending or len(queue):
        arriving = data.draw(st.integers(0 if len(queue) else 1, len(pending))) if pending else 0
        for number, spec in pending[:arriving]:
            one = job(*spec)
            names[one] = f"job{number}"
            queue.push(one)
            twin.push(f"job{number}", spec)
        pending = pending[arriving:]
        step = queue.take()
        assert positions(step, names) == twin.take()
        assert step
        taken = positions(step, names)
        assert twin.cost(taken) <= twin.room or len(taken) == 1
        total += taken
    expected = [(f"job{n}", g, m) for n, s in enumerate(specs) for g, (_, own) in enumerate(s) for m in range(len(own))]
    assert sorted(total) == sorted(expected), "each response once, none lost"


def bulk(*groups: tuple[int, list[int]]) -> Job:
    made = job(*groups)
    made.bulk = True
    return made


def test_bulk_work_fills_the_room_that_interactive_work_leaves():
    queue = FairQueue(100)
    behind, pair = bulk((0, [10] * 100)), job((10, [5, 5]))
    queue.push(behind)
    queue.push(pair)
    step = queue.take()
    assert [job for job, _ in step] == [pair, behind]
    assert step[1][1].stop - step[1][1].start == 2  # one turn: the pair does not wait for a full step


def test_bulk_work_never_starves():
    queue = FairQueue(100)
    waiting = bulk((0, [10] * 10))
    queue.push(waiting)
    steps = 0
    while not waiting.fully_scheduled:
        queue.push(job((0, [100])))  # interactive work without end, each a whole step
        queue.take()
        steps += 1
        assert steps <= BULK_FIRST_EVERY
    assert steps == BULK_FIRST_EVERY


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 60), min_size=1, max_size=8)), max_size=8))
def test_both_classes_are_computed_once_within_the_budget(drawn):
    queue = FairQueue(100)
    jobs = [(bulk if is_bulk else job)((0, own)) for is_bulk, own in drawn]
    for one in jobs:
        queue.push(one)
    names = {one: str(index) for index, one in enumerate(jobs)}
    seen: list[tuple[str, int, int]] = []
    for step in drain(queue):
        seen += sorted(positions(step, names))
        lengths = [job.plans[part.group].lengths[part.start : part.stop] for job, part in step]
        assert sum(map(sum, lengths)) <= 100
    assert sorted(seen) == sorted((str(i), 0, m) for i, (_, own) in enumerate(drawn) for m in range(len(own)))
    assert len(queue) == 0
