"""Nothing is computed twice, and nobody pays for that: not by another's error, hang-up, class or size."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import httpx
import pytest

from marginrm_service.engine.coalescing import Reuse, Reused
from marginrm_service.engine.engine import ScoringEngine
from marginrm_service.engine.job import Job
from marginrm_service.engine.reward_cache import RewardCache, places_of
from marginrm_service.errors import EngineStoppedError, ForwardFailedError
from support.server import serving
from support.service import FakeModel, FakeRewardModel, Gate, group, reward_of, sized_group

LINES = {"Accept": "application/x-ndjson"}


class House:
    """An engine on a fake model, and what is reused before it."""

    def __init__(self, **misbehaviour) -> None:
        self.gate = Gate()
        self.model = FakeModel(**misbehaviour)
        self.engine = ScoringEngine(self.model)
        self.cache = RewardCache(2**20)
        self.reuse = Reuse(self.cache)

    async def __aenter__(self) -> Self:
        self.engine.start()
        return self

    async def __aexit__(self, *exception) -> None:
        self.gate.open(100)
        await self.engine.close()
        assert self.reuse._owners == {}, "nobody is left to wait for"

    def hold(self) -> None:
        """From now on each step waits for `let_go`."""
        self.model.on_forward = self.gate

    async def held(self) -> None:
        assert await asyncio.to_thread(self.gate.entered.acquire, timeout=30)

    def let_go(self) -> None:
        self.model.on_forward = lambda _: None
        self.gate.open(100)

    async def begin(self, job: Job) -> asyncio.Task[Reused]:
        """Runs a job as far as it comes by itself."""
        task = asyncio.create_task(self.reuse.run(job, self.engine.run))
        await asyncio.sleep(0)
        return task

    @property
    def computed(self) -> list[list[list[tuple[int, ...]]]]:
        """Token ids of all steps, by group."""
        return [[[member.ids for member in members] for members in step] for step in self.model.steps]


def job(*groups, bulk: bool = False) -> Job:
    made = Job.of(groups, share_prefix=True)
    made.places, made.bulk = places_of(groups), bulk
    return made


def expected(one: Job) -> list[list[float]]:
    return [[reward_of(member) for member in members] for members in one.groups]


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_reward_that_was_given_is_given_again_without_a_step():
    async def scenario():
        async with House() as house:
            first, again = job(sized_group(10, 3, 4)), job(sized_group(10, 3, 4))
            assert await (await house.begin(first)) == Reused(0, 0, 2)
            assert await (await house.begin(again)) == Reused(2, 0, 0)
            assert first.outcomes == again.outcomes == expected(again)
            assert (first.computed, again.computed) == (17, 0)
            assert first.started_at >= first.queued_at
            assert first.forward_seconds > 0
            assert (again.started_at, again.forward_seconds) == (None, 0.0)
            assert len(house.model.steps) == 1

    run(scenario)


def test_equal_responses_of_one_request_are_computed_once():
    async def scenario():
        async with House() as house:
            one = job(group([1, 2], [1, 3], [1, 2]), group([1, 2]), group([9]))
            assert await (await house.begin(one)) == Reused(0, 2, 3)
            assert one.outcomes == expected(one)
            assert house.computed == [[[(1, 2), (1, 3)], [(9,)]]]

    run(scenario)


def test_what_is_left_of_a_group_stays_a_group():
    async def scenario():
        async with House() as house:
            whole = sized_group(10, 3, 4, 5)
            await (await house.begin(job(whole[1:2])))
            one = job(whole)
            assert await (await house.begin(one)) == Reused(1, 0, 2)
            assert one.outcomes == expected(one)
            assert house.computed[1:] == [[[whole[0].ids, whole[2].ids]]]
            assert one.computed == 10 + 3 + 5

    run(scenario)


def test_a_part_has_the_members_plans_and_class_of_the_whole():
    whole = job(sized_group(10, 3, 4, 5), sized_group(2, 1), bulk=True)
    part = whole.part({0: [0, 2], 1: [0]})
    assert [(plan.lengths, plan.shared, plan.cost) for plan in part.plans] == [([13, 15], 10, 18), ([3], 0, 3)]
    assert part.bulk
    lone = whole.part({0: [1]})
    assert [(plan.lengths, plan.shared, plan.cost) for plan in lone.plans] == [([14], 0, 14)]
    assert whole.part({}).cost == 0


def test_two_requests_at_once_are_computed_once():
    async def scenario():
        async with House() as house:
            house.hold()
            first, second = job(sized_group(10, 3, 4)), job(sized_group(10, 3, 4))
            tasks = [await house.begin(first), await house.begin(second)]
            await house.held()
            house.let_go()
            assert await asyncio.gather(*tasks) == [Reused(0, 0, 2), Reused(0, 2, 0)]
            assert first.outcomes == second.outcomes == expected(first)
            assert second.computed == 0
            assert len(house.model.steps) == 1

    run(scenario)


@pytest.mark.parametrize("in_step", [True, False])
def test_who_waits_for_a_request_that_goes_away_computes_it_itself(in_step):
    async def scenario():
        async with House() as house:
            house.hold()
            others = [] if in_step else [await house.begin(job(group([7, 7, 7, 7])))]
            if others:
                await house.held()
            owner = await house.begin(job(group([1, 2, 3, 4])))
            if in_step:
                await house.held()
            waiting = job(group([1, 2, 3, 4], [1, 2, 3, 5]))
            waiter = await house.begin(waiting)
            owner.cancel()
            await asyncio.wait([owner])
            house.let_go()
            assert await waiter == Reused(0, 0, 2)
            await asyncio.gather(*others)
            assert owner.cancelled()
            assert waiting.outcomes == expected(waiting)
            assert waiting.computed == 8

    run(scenario)


def test_what_is_computed_for_a_request_that_went_away_is_kept():
    async def scenario():
        async with House() as house:
            house.hold()
            owner = await house.begin(job(group([1, 2, 3, 4])))
            await house.held()
            owner.cancel()
            await asyncio.wait([owner])
            house.let_go()
            await (await house.begin(job(group([5]))))  # a later step
            assert await (await house.begin(job(group([1, 2, 3, 4])))) == Reused(1, 0, 0)

    run(scenario)


def test_anothers_error_is_not_ones_own():
    async def scenario():
        async with House() as house:
            failed = asyncio.Event()

            def fail_once(groups):
                house.gate(groups)
                if not failed.is_set():
                    failed.set()
                    raise RuntimeError("out of memory, for once")

            house.model.on_forward = fail_once
            owned, waiting = job(group([1, 2])), job(group([1, 2]))
            owner, waiter = await house.begin(owned), await house.begin(waiting)
            house.gate.open(100)
            await owner
            assert await waiter == Reused(0, 0, 1)
            assert isinstance(owned.outcomes[0][0], ForwardFailedError)
            assert waiting.outcomes == expected(waiting)

    run(scenario)


def test_a_text_that_always_fails_fails_once_for_each_request_and_is_never_kept():
    async def scenario():
        async with House(poisoned=666) as house:
            house.hold()
            jobs = [job(group([1, 666]), group([1, 666])) for _ in range(5)]
            tasks = [await house.begin(one) for one in jobs]
            house.let_go()
            await asyncio.gather(*tasks)
            assert {type(outcome) for one in jobs for row in one.outcomes for outcome in row} == {ForwardFailedError}
            assert house.computed.count([[(1, 666)]]) == len(jobs)
            assert len(house.cache) == 0

    run(scenario)


def test_no_number_is_not_kept():
    async def scenario():
        async with House(nan_token=13) as house:
            for _ in range(2):
                one = job(group([1, 13], [1, 2]))
                await (await house.begin(one))
                assert [type(outcome).__name__ for outcome in one.outcomes[0]] == ["NonFiniteRewardError", "float"]
            assert len(house.cache) == 1

    run(scenario)


def test_whatever_ends_a_request_ends_nobody_elses():
    async def scenario():
        async with House() as house:
            refuse = asyncio.Event()

            async def refused(_: Job) -> None:
                await refuse.wait()
                raise EngineStoppedError("Not you.")

            owner = asyncio.create_task(house.reuse.run(job(group([1, 2])), refused))
            await asyncio.sleep(0)
            waiting = job(group([1, 2]))
            waiter = await house.begin(waiting)
            refuse.set()
            with pytest.raises(EngineStoppedError, match="Not you"):
                await owner
            assert await waiter == Reused(0, 0, 1)
            assert waiting.outcomes == expected(waiting)

    run(scenario)


def test_who_stops_waiting_is_forgotten_and_disturbs_nobody():
    async def scenario():
        async with House() as house:
            house.hold()
            owned = job(group([1, 2]))
            owner = await house.begin(owned)
            await house.held()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await house.reuse.run(job(group([1, 2])), house.engine.run)
            (request,) = house.reuse._owners.values()
            assert list(request.claims.values()) == [{}]
            house.let_go()
            assert await owner == Reused(0, 0, 1)
            assert owned.outcomes == expected(owned)

    run(scenario)


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        (job(group([1, 2])), job(group([1, 2]), group([8])), True),
        (job(group([1, 2]), group([8])), job(group([1, 2])), False),  # whose turn comes before the long one's end
        (job(group([1, 2]), bulk=True), job(group([1, 2]), group([8])), False),
        (job(group([1, 2]), bulk=True), job(group([1, 2]), bulk=True), True),
        (job(group([1, 2]), group([8])), job(group([1, 2]), bulk=True), True),
    ],
)
def test_nobody_waits_for_a_longer_request_or_a_lower_class(first, second, waits):
    async def scenario():
        async with House() as house:
            house.hold()
            tasks = [await house.begin(first), await house.begin(second)]
            third = job(group([1, 2]), bulk=True)
            tasks.append(await house.begin(third))  # waits for who claimed it last, and gets it
            house.let_go()
            await asyncio.gather(*tasks)
            for one in (first, second, third):
                assert one.outcomes == expected(one)
            times = Counter(ids for step in house.computed for rows in step for ids in rows)[1, 2]
            assert times == (1 if waits else 2)

    run(scenario)


def test_a_request_is_as_long_as_what_it_has_left_to_compute():
    async def scenario():
        async with House() as house:
            await (await house.begin(job(group([8] * 30))))
            house.hold()
            tasks = [await house.begin(job(group([8] * 30), group([1, 2]))), await house.begin(job(group([1, 2])))]
            house.let_go()
            assert await asyncio.gather(*tasks) == [Reused(1, 0, 1), Reused(0, 1, 0)]

    run(scenario)


def test_who_claimed_last_is_waited_for_though_an_earlier_one_goes_away():
    async def scenario():
        async with House() as house:
            house.hold()
            busy = await house.begin(job(group([7])))
            await house.held()
            bulk = await house.begin(job(group([1, 2]), bulk=True))
            owner = await house.begin(job(group([1, 2])))
            bulk.cancel()
            await asyncio.wait([bulk])
            waiter = await house.begin(job(group([1, 2])))
            house.let_go()
            assert await asyncio.gather(busy, owner, waiter) == [Reused(0, 0, 1), Reused(0, 0, 1), Reused(0, 1, 0)]

    run(scenario)


def test_what_was_computed_is_not_held_in_a_circle():
    async def scenario():
        async with House() as house:
            parts: list[Job] = []

            async def noting(part: Job) -> None:
                parts.append(part)
                await house.engine.run(part)

            await house.reuse.run(job(group([1, 2])), noting)
            assert [part.on_group for part in parts] == [None]

    run(scenario)


def test_a_group_is_told_of_once_it_is_complete_wherever_its_rewards_came_from():
    async def scenario():
        async with House() as house:
            await (await house.begin(job(group([1]), group([2]))))
            house.hold()
            owner = await house.begin(job(group([3])))
            await house.held()
            one = job(group([1], [2]), group([1], [3]), group([4]), group([3]))
            told: list[int] = []
            one.on_group = told.append
            task = await house.begin(one)
            assert told == [0]  # no step had to end
            house.let_go()
            assert await task == Reused(3, 2, 1)
            await owner
            assert sorted(told) == [0, 1, 2, 3]
            assert one.outcomes == expected(one)

    run(scenario)


def test_a_crowd_that_comes_and_goes_gets_its_rewards():
    async def scenario():
        rng, luck = random.Random(0), random.Random(1)
        async with House(token_budget=20) as house:

            def now_and_then(groups):
                if luck.random() < 0.2:
                    raise RuntimeError("for once")

            house.model.on_forward = now_and_then
            house.reuse._cache = RewardCache(350 * 5)  # of 40 texts, so that rewards come and go too
            texts = [[number % 4] * (1 + number % 7) + [number] for number in range(40)]
            jobs = [
                job(
                    *[group(*rng.choices(texts, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))],
                    bulk=rng.random() < 0.3,
                )
                for _ in range(400)
            ]
            tasks = []
            for one in jobs:
                tasks.append(await house.begin(one))
                if rng.random() < 0.2:
                    rng.choice(tasks[-5:]).cancel()
                if rng.random() < 0.1:
                    await asyncio.sleep(0.001)
            await asyncio.wait(tasks)
            assert sum(task.cancelled() for task in tasks) > 20
            for one, task in zip(jobs, tasks, strict=True):
                if not task.cancelled():
                    reused = task.result()
                    assert reused.stored + reused.in_flight + reused.computed == sum(map(len, one.groups))
                    for row, right in zip(one.outcomes, expected(one), strict=True):
                        for outcome, reward in zip(row, right, strict=True):
                            assert outcome == reward or isinstance(outcome, ForwardFailedError)

    run(scenario)


def metric(url: str, sample: str) -> float | None:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample)), None)


BODY = {"pairs": [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}]}


def test_routes_and_adapters_share_what_is_kept_and_it_is_counted():
    model = FakeRewardModel()
    with serving(model) as server, httpx.Client(base_url=server.url) as http:
        steps = len(model.steps)
        hits = 'marginrm_reward_cache_hits_total{kind="stored",model="default"}'
        misses = 'marginrm_reward_cache_misses_total{model="default"}'
        assert (metric(server.url, hits), metric(server.url, misses)) == (None, None)  # warming up is nobody's request
        first, second = (http.post("/score", json=BODY).json() for _ in range(2))
        assert first["pairs"] == second["pairs"]
        assert first["usage"]["tokens_computed"] > 0
        assert second["usage"] == {**first["usage"], "tokens_computed": 0}
        ranked = http.post("/rerank", json={"query": "Why?", "texts": ["No.", "Because."], "raw_scores": True}).json()
        assert {entry["index"]: entry["score"] for entry in ranked} == {
            0: model.expect("Why?", "No."),
            1: model.expect("Why?", "Because."),
        }
        assert len(model.steps) == steps + 1
        assert (metric(server.url, hits), metric(server.url, misses)) == (4.0, 2.0)
        assert metric(server.url, "marginrm_reward_cache_bytes") == 700.0
        assert server.service.registry.get("default")._door.tokens == 0


def test_requests_at_the_same_time_are_one_step():
    model, gate = FakeRewardModel(), Gate()
    with serving(model) as server, ThreadPoolExecutor(8) as threads:
        steps = len(model.steps)
        model.on_forward = gate
        door = server.service.registry.get("default")._door
        calls = [threads.submit(httpx.post, f"{server.url}/score", json=BODY, timeout=30) for _ in range(8)]
        assert gate.entered.acquire(timeout=30)
        while sum(permit.tokens == 0 for permit in list(door.inside)) < 7:  # who waits holds no room in the queue
            time.sleep(0.005)
        gate.open(8)
        assert len({call.result().text for call in calls if call.result().json()["usage"]["tokens_computed"] == 0}) == 1
        assert len(model.steps) == steps + 1
        assert metric(server.url, 'marginrm_reward_cache_hits_total{kind="in_flight",model="default"}') == 14.0


def test_without_a_cache_everything_is_computed():
    model = FakeRewardModel()
    with serving(model, reward_cache_mib=0) as server, httpx.Client(base_url=server.url) as http:
        steps = len(model.steps)
        body = {"items": [{"prompt": "Why?", "response": "No."}] * 3}
        first, second = (http.post("/score", json=body).json() for _ in range(2))
        assert first == second
        assert sum(len(members) for step in model.steps[steps:] for members in step) == 6
        assert metric(server.url, "marginrm_reward_cache_hits_total{") is None
        assert metric(server.url, "marginrm_reward_cache_bytes{") == 0.0


def test_a_new_revision_begins_with_nothing_kept():
    old, new = FakeRewardModel(), FakeRewardModel()
    with serving(old) as server, httpx.Client(base_url=server.url) as http:
        http.post("/score", json=BODY)
        server.on_loop(server.service.registry.add(new))
        assert metric(server.url, "marginrm_reward_cache_bytes{") == 0.0
        assert http.post("/score", json=BODY).json()["usage"]["tokens_computed"] > 0


def test_room_is_taken_for_what_is_left_to_compute():
    items = [{"prompt": "p", "response": f"{number} " + "word " * 20} for number in range(10)]
    with serving(FakeRewardModel(), max_queue_tokens=100) as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/score", json={"items": items}).status_code == 413
        for item in items[1:]:
            assert http.post("/score", json={"items": [item]}).status_code == 200
        assert http.post("/score", json={"items": items}).status_code == 200
        assert server.service.registry.get("default")._door.tokens == 0


def test_a_stream_has_a_line_for_prompts_whose_rewards_are_all_kept_before_a_step():
    prompts = [{"prompt": f"Question {number}?", "candidates": ["Yes.", "No."]} for number in range(4)]
    model, gate = FakeRewardModel(), Gate()
    with serving(model) as server, httpx.Client(base_url=server.url) as http:
        plain = http.post("/best-of-n", json={"prompts": prompts[:3]}).json()
        model.on_forward = gate
        with http.stream("POST", "/best-of-n", json={"prompts": prompts}, headers=LINES) as response:
            incoming = response.iter_lines()
            early = [json.loads(next(incoming)) for _ in range(3)]
            assert gate.entered.acquire(timeout=30)
            gate.open()
            last, end = map(json.loads, incoming)
        assert early == plain["prompts"]
        assert last["index"] == 3
        assert end["usage"]["responses"] == 8
        assert 0 < end["usage"]["tokens_computed"] < end["usage"]["tokens"] / 3
