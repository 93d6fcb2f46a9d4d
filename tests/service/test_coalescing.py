"""Request coalescing: no response is computed twice, and no request suffers from another one's error or end."""

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

from marginrm_service.engine.coalescing import Coalescer
from marginrm_service.engine.engine import ScoringEngine
from marginrm_service.engine.job import Job
from marginrm_service.engine.request import Reuse
from marginrm_service.engine.reward_cache import RewardCache, positions_by_key
from marginrm_service.errors import EngineStoppedError, ForwardFailedError
from support.server import serving
from support.service import FakeModel, FakeRewardModel, Gate, group, reward_of, sized_group

LINES = {"Accept": "application/x-ndjson"}


class Harness:
    """An engine on a fake model, with coalescing before it."""

    def __init__(self, **misbehaviour) -> None:
        self.gate = Gate()
        self.model = FakeModel(**misbehaviour)
        self.engine = ScoringEngine(self.model)
        self.coalescer = Coalescer(RewardCache(2**20))

    async def __aenter__(self) -> Self:
        self.engine.start()
        return self

    async def __aexit__(self, *exception) -> None:
        self.gate.open(100)
        await self.engine.close()
        assert self.coalescer.keys_in_flight == 0

    def hold(self) -> None:
        """From now on each step waits for `release`."""
        self.model.on_forward = self.gate

    async def held(self) -> None:
        assert await asyncio.to_thread(self.gate.entered.acquire, timeout=120)

    def release(self) -> None:
        self.model.on_forward = lambda _: None
        self.gate.open(100)

    async def compute(self, job: Job) -> Reuse:
        """Computes a job as `scoring.score` does."""
        with self.coalescer.open(job, positions_by_key(job.groups)) as shared:
            while part := await shared.next_part():
                await self.engine.run(part)
        return shared.reuse

    async def begin(self, job: Job) -> asyncio.Task[Reuse]:
        """Starts to compute a job, until it waits."""
        task = asyncio.create_task(self.compute(job))
        await asyncio.sleep(0)
        return task

    @property
    def computed(self) -> list[list[list[tuple[int, ...]]]]:
        """Token ids of all steps, by group."""
        return [[[member.ids for member in members] for members in step] for step in self.model.steps]


def job(*groups, bulk: bool = False) -> Job:
    made = Job.of(groups, share_prefix=True)
    made.bulk = bulk
    return made


def expected(one: Job) -> list[list[float]]:
    return [[reward_of(member) for member in members] for members in one.groups]


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_cached_reward_needs_no_step():
    async def scenario():
        async with Harness() as harness:
            first, again = job(sized_group(10, 3, 4)), job(sized_group(10, 3, 4))
            assert await (await harness.begin(first)) == Reuse(0, 0, 2)
            assert await (await harness.begin(again)) == Reuse(2, 0, 0)
            assert first.outcomes == again.outcomes == expected(again)
            assert (first.computed, again.computed) == (17, 0)
            assert first.started_at >= first.queued_at
            assert first.forward_seconds > 0
            assert (again.started_at, again.forward_seconds) == (None, 0.0)
            assert len(harness.model.steps) == 1

    run(scenario)


def test_equal_responses_of_one_request_are_computed_once():
    async def scenario():
        async with Harness() as harness:
            one = job(group([1, 2], [1, 3], [1, 2]), group([1, 2]), group([9]))
            assert await (await harness.begin(one)) == Reuse(0, 2, 3)
            assert one.outcomes == expected(one)
            assert harness.computed == [[[(1, 2), (1, 3)], [(9,)]]]

    run(scenario)


def test_the_rest_of_a_group_stays_one_group():
    async def scenario():
        async with Harness() as harness:
            whole = sized_group(10, 3, 4, 5)
            await (await harness.begin(job(whole[1:2])))
            one = job(whole)
            assert await (await harness.begin(one)) == Reuse(1, 0, 2)
            assert one.outcomes == expected(one)
            assert harness.computed[1:] == [[[whole[0].ids, whole[2].ids]]]
            assert one.computed == 10 + 3 + 5

    run(scenario)


def test_a_subset_has_the_plans_and_the_class_of_the_whole_job():
    whole = job(sized_group(10, 3, 4, 5), sized_group(2, 1), bulk=True)
    part = whole.subset({0: [0, 2], 1: [0]})
    assert [(plan.lengths, plan.shared, plan.cost) for plan in part.plans] == [([13, 15], 10, 18), ([3], 0, 3)]
    assert part.bulk
    lone = whole.subset({0: [1]})
    assert [(plan.lengths, plan.shared, plan.cost) for plan in lone.plans] == [([14], 0, 14)]
    assert whole.subset({}).cost == 0


def test_two_equal_requests_are_computed_once():
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            first, second = job(sized_group(10, 3, 4)), job(sized_group(10, 3, 4))
            tasks = [await harness.begin(first), await harness.begin(second)]
            await harness.held()
            harness.release()
            assert await asyncio.gather(*tasks) == [Reuse(0, 0, 2), Reuse(0, 2, 0)]
            assert first.outcomes == second.outcomes == expected(first)
            assert second.computed == 0
            assert len(harness.model.steps) == 1

    run(scenario)


@pytest.mark.parametrize("in_step", [True, False])
def test_a_waiting_request_computes_for_itself_if_the_owner_is_cancelled(in_step):
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            others = [] if in_step else [await harness.begin(job(group([7, 7, 7, 7])))]
            if others:
                await harness.held()
            owner = await harness.begin(job(group([1, 2, 3, 4])))
            if in_step:
                await harness.held()
            waiting = job(group([1, 2, 3, 4], [1, 2, 3, 5]))
            waiter = await harness.begin(waiting)
            owner.cancel()
            await asyncio.wait([owner])
            harness.release()
            assert await waiter == Reuse(0, 0, 2)
            await asyncio.gather(*others)
            assert owner.cancelled()
            assert waiting.outcomes == expected(waiting)
            assert waiting.computed == 8

    run(scenario)


def test_rewards_computed_for_a_cancelled_request_are_cached():
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            owner = await harness.begin(job(group([1, 2, 3, 4])))
            await harness.held()
            owner.cancel()
            await asyncio.wait([owner])
            harness.release()
            await (await harness.begin(job(group([5]))))  # a later step
            assert await (await harness.begin(job(group([1, 2, 3, 4])))) == Reuse(1, 0, 0)

    run(scenario)


def test_an_error_of_the_owner_is_not_passed_on():
    async def scenario():
        async with Harness() as harness:
            failed = asyncio.Event()

            def fail_once(groups):
                harness.gate(groups)
                if not failed.is_set():
                    failed.set()
                    raise RuntimeError("out of memory, for once")

            harness.model.on_forward = fail_once
            owned, waiting = job(group([1, 2])), job(group([1, 2]))
            owner, waiter = await harness.begin(owned), await harness.begin(waiting)
            harness.gate.open(100)
            await owner
            assert await waiter == Reuse(0, 0, 1)
            assert isinstance(owned.outcomes[0][0], ForwardFailedError)
            assert waiting.outcomes == expected(waiting)

    run(scenario)


def test_a_text_that_always_fails_is_tried_once_for_each_request_and_never_cached():
    async def scenario():
        async with Harness(poisoned=666) as harness:
            harness.hold()
            jobs = [job(group([1, 666]), group([1, 666])) for _ in range(5)]
            tasks = [await harness.begin(one) for one in jobs]
            harness.release()
            await asyncio.gather(*tasks)
            assert {type(outcome) for one in jobs for row in one.outcomes for outcome in row} == {ForwardFailedError}
            assert harness.computed.count([[(1, 666)]]) == len(jobs)
            assert len(harness.coalescer.cache) == 0

    run(scenario)


def test_a_reward_that_is_not_finite_is_not_cached():
    async def scenario():
        async with Harness(nan_token=13) as harness:
            for _ in range(2):
                one = job(group([1, 13], [1, 2]))
                await (await harness.begin(one))
                assert [type(outcome).__name__ for outcome in one.outcomes[0]] == ["NonFiniteRewardError", "float"]
            assert len(harness.coalescer.cache) == 1

    run(scenario)


def test_an_exception_of_the_owner_is_not_passed_on():
    async def scenario():
        async with Harness() as harness:
            refuse = asyncio.Event()

            async def refused() -> None:
                one = job(group([1, 2]))
                with harness.coalescer.open(one, positions_by_key(one.groups)) as shared:
                    assert await shared.next_part()
                    await refuse.wait()
                    raise EngineStoppedError("Not you.")

            owner = asyncio.create_task(refused())
            await asyncio.sleep(0)
            waiting = job(group([1, 2]))
            waiter = await harness.begin(waiting)
            refuse.set()
            with pytest.raises(EngineStoppedError, match="Not you"):
                await owner
            assert await waiter == Reuse(0, 0, 1)
            assert waiting.outcomes == expected(waiting)

    run(scenario)


def test_a_request_that_stops_waiting_does_not_affect_the_owner():
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            owned = job(group([1, 2]))
            owner = await harness.begin(owned)
            await harness.held()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await harness.compute(job(group([1, 2])))
            assert harness.coalescer.keys_in_flight == 1
            harness.release()
            assert await owner == Reuse(0, 0, 1)
            assert owned.outcomes == expected(owned)

    run(scenario)


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        (job(group([1, 2])), job(group([1, 2]), group([8])), True),
        (job(group([1, 2]), group([8])), job(group([1, 2])), False),  # its turn comes before the long one ends
        (job(group([1, 2]), bulk=True), job(group([1, 2]), group([8])), False),
        (job(group([1, 2]), bulk=True), job(group([1, 2]), bulk=True), True),
        (job(group([1, 2]), group([8])), job(group([1, 2]), bulk=True), True),
    ],
)
def test_a_request_waits_neither_for_a_longer_one_nor_for_a_lower_class(first, second, waits):
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            tasks = [await harness.begin(first), await harness.begin(second)]
            third = job(group([1, 2]), bulk=True)
            tasks.append(await harness.begin(third))  # waits for the last owner
            harness.release()
            await asyncio.gather(*tasks)
            for one in (first, second, third):
                assert one.outcomes == expected(one)
            times = Counter(ids for step in harness.computed for rows in step for ids in rows)[1, 2]
            assert times == (1 if waits else 2)

    run(scenario)


def test_the_length_of_a_request_is_what_it_has_left_to_compute():
    async def scenario():
        async with Harness() as harness:
            await (await harness.begin(job(group([8] * 30))))
            harness.hold()
            tasks = [await harness.begin(job(group([8] * 30), group([1, 2]))), await harness.begin(job(group([1, 2])))]
            harness.release()
            assert await asyncio.gather(*tasks) == [Reuse(1, 0, 1), Reuse(0, 1, 0)]

    run(scenario)


def test_the_last_owner_is_awaited_though_an_earlier_one_is_cancelled():
    async def scenario():
        async with Harness() as harness:
            harness.hold()
            busy = await harness.begin(job(group([7])))
            await harness.held()
            bulk = await harness.begin(job(group([1, 2]), bulk=True))
            owner = await harness.begin(job(group([1, 2])))
            bulk.cancel()
            await asyncio.wait([bulk])
            waiter = await harness.begin(job(group([1, 2])))
            harness.release()
            assert await asyncio.gather(busy, owner, waiter) == [Reuse(0, 0, 1), Reuse(0, 0, 1), Reuse(0, 1, 0)]

    run(scenario)


def test_a_computed_part_is_in_no_reference_cycle():
    async def scenario():
        async with Harness() as harness:
            one = job(group([1, 2]))
            with harness.coalescer.open(one, positions_by_key(one.groups)) as shared:
                part = await shared.next_part()
                await harness.engine.run(part)
                assert await shared.next_part() is None
            assert part.on_group is None

    run(scenario)


def test_a_group_is_announced_when_complete_whatever_the_source_of_its_rewards():
    async def scenario():
        async with Harness() as harness:
            await (await harness.begin(job(group([1]), group([2]))))
            harness.hold()
            owner = await harness.begin(job(group([3])))
            await harness.held()
            one = job(group([1], [2]), group([1], [3]), group([4]), group([3]))
            announced: list[int] = []
            one.on_group = announced.append
            task = await harness.begin(one)
            assert announced == [0]  # no step had to end
            harness.release()
            assert await task == Reuse(3, 2, 1)
            await owner
            assert sorted(announced) == [0, 1, 2, 3]
            assert one.outcomes == expected(one)

    run(scenario)


def test_many_requests_with_faults_and_cancellations_get_their_rewards():
    async def scenario():
        rng, luck = random.Random(0), random.Random(1)
        async with Harness(token_budget=20) as harness:

            def sometimes_fail(groups):
                if luck.random() < 0.2:
                    raise RuntimeError("for once")

            harness.model.on_forward = sometimes_fail
            harness.coalescer.cache = RewardCache(350 * 5)  # of 40 texts, so that rewards are evicted too
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
                tasks.append(await harness.begin(one))
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


def test_routes_and_adapters_share_cached_rewards_and_count_them():
    model = FakeRewardModel()
    with serving(model) as server, httpx.Client(base_url=server.url) as http:
        steps = len(model.steps)
        hits = 'marginrm_reward_cache_hits_total{kind="stored",model="default"}'
        misses = 'marginrm_reward_cache_misses_total{model="default"}'
        assert (metric(server.url, hits), metric(server.url, misses)) == (None, None)  # the warm-up is not counted
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
        assert server.service.registry.get("default").queue_state().tokens == 0


def test_equal_concurrent_requests_are_one_step():
    model, gate = FakeRewardModel(), Gate()
    with serving(model) as server, ThreadPoolExecutor(8) as threads:
        steps = len(model.steps)
        model.on_forward = gate
        queue_state = server.service.registry.get("default").queue_state
        calls = [threads.submit(httpx.post, f"{server.url}/score", json=BODY, timeout=120) for _ in range(8)]
        assert gate.entered.acquire(timeout=120)
        while queue_state().waiting_for_others < 7:
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


def test_a_new_revision_starts_with_an_empty_cache():
    old, new = FakeRewardModel(), FakeRewardModel()
    with serving(old) as server, httpx.Client(base_url=server.url) as http:
        http.post("/score", json=BODY)
        server.on_loop(server.service.registry.add(new))
        assert metric(server.url, "marginrm_reward_cache_bytes{") == 0.0
        assert http.post("/score", json=BODY).json()["usage"]["tokens_computed"] > 0


def test_capacity_is_held_for_the_rest_to_compute_only():
    items = [{"prompt": "p", "response": f"{number} " + "word " * 20} for number in range(10)]
    with serving(FakeRewardModel(), max_queue_tokens=100) as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/score", json={"items": items}).status_code == 413
        for item in items[1:]:
            assert http.post("/score", json={"items": [item]}).status_code == 200
        assert http.post("/score", json={"items": items}).status_code == 200
        assert server.service.registry.get("default").queue_state().tokens == 0


def test_a_stream_sends_prompts_with_cached_rewards_before_the_first_step():
    prompts = [{"prompt": f"Question {number}?", "candidates": ["Yes.", "No."]} for number in range(4)]
    model, gate = FakeRewardModel(), Gate()
    with serving(model) as server, httpx.Client(base_url=server.url) as http:
        plain = http.post("/best-of-n", json={"prompts": prompts[:3]}).json()
        model.on_forward = gate
        with http.stream("POST", "/best-of-n", json={"prompts": prompts}, headers=LINES) as response:
            incoming = response.iter_lines()
            early = [json.loads(next(incoming)) for _ in range(3)]
            assert gate.entered.acquire(timeout=120)
            gate.open()
            last, end = map(json.loads, incoming)
        assert early == plain["prompts"]
        assert last["index"] == 3
        assert end["usage"]["responses"] == 8
        assert 0 < end["usage"]["tokens_computed"] < end["usage"]["tokens"] / 3
