"""The engine with a fake model: waiting jobs share a step, and no response is lost or mixed up."""

from __future__ import annotations

import asyncio
import random

import pytest

from marginrm_service.engine.engine import ScoringEngine, StepReport
from marginrm_service.engine.job import Job
from marginrm_service.errors import EngineStoppedError, ForwardFailedError
from support.service import FakeModel, Gate, group, reward_of, sized_group


def job(*groups) -> Job:
    return Job.of(groups, share_prefix=True)


def expected(one: Job) -> list[list[float]]:
    return [[reward_of(member) for member in members] for members in one.groups]


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, timeout=120)


def test_a_single_job_is_one_step():
    async def scenario():
        model, reports = FakeModel(), []
        engine = ScoringEngine(model, on_step=reports.append)
        engine.start()
        one = job(sized_group(10, 3, 4))
        await engine.run(one)
        await engine.close()
        assert one.outcomes == expected(one)
        assert one.computed == 17
        assert one.queued_at <= one.started_at
        assert one.forward_seconds > 0
        assert len(model.steps) == 1
        assert [type(report) for report in reports] == [StepReport]
        assert (reports[0].responses, reports[0].requested, reports[0].computed, reports[0].faults) == (2, 27, 17, 0)

    asyncio.run(scenario())


def test_jobs_that_arrive_during_a_step_share_the_next_one():
    async def scenario():
        gate = Gate()
        model = FakeModel(on_forward=gate)
        engine = ScoringEngine(model)
        engine.start()
        jobs = [job(sized_group(5, 2, 2)) for _ in range(6)]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.run(jobs[0]))
            await entered(gate)
            for one in jobs[1:]:
                tasks.create_task(engine.run(one))
            await asyncio.sleep(0)
            gate.open(2)
        await engine.close()
        assert [len(step) for step in model.steps] == [1, 5]
        assert all(one.outcomes == expected(one) for one in jobs)

    asyncio.run(scenario())


def test_a_step_waits_for_the_jobs_that_follow_on_the_replies_of_the_last_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("marginrm_service.engine.engine._WAIT", 1e9)  # of a step's time: as long as it takes

    async def scenario():
        gate = Gate()
        model = FakeModel(on_forward=gate)
        engine = ScoringEngine(model)
        engine.start()

        async def client(requests: int) -> None:
            for _ in range(requests):
                await engine.run(job(sized_group(5, 2)))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client(4))
            await entered(gate)
            for _ in range(4):
                tasks.create_task(client(3))
            await asyncio.sleep(0)
            gate.open(4)
        await engine.close()
        assert [len(step) for step in model.steps] == [1, 5, 5, 5], "those that wait and those that follow, together"

    asyncio.run(scenario())


def test_after_a_wait_in_vain_the_next_steps_do_not_wait(monkeypatch: pytest.MonkeyPatch):
    async def scenario():
        gate = Gate()
        model = FakeModel(on_forward=gate)
        engine = ScoringEngine(model)
        engine.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.run(job(sized_group(5, 2))))
            for wait in (5.0, 1e9):  # a job comes during each step, and no job follows on a reply
                await entered(gate)
                monkeypatch.setattr("marginrm_service.engine.engine._WAIT", wait)
                tasks.create_task(engine.run(job(sized_group(5, 2))))
                await asyncio.sleep(0)
                gate.open(1)
            gate.open(1)
        await engine.close()
        assert [len(step) for step in model.steps] == [1, 1, 1]

    asyncio.run(scenario())


def test_an_unfinished_job_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("marginrm_service.engine.engine._WAIT", 1e9)

    async def scenario():
        model = FakeModel(token_budget=10)
        engine = ScoringEngine(model)
        engine.start()
        large, small = job(*[sized_group(0, 8)] * 6), job(sized_group(0, 1))
        await asyncio.gather(engine.run(large), engine.run(small))
        await engine.close()
        assert large.outcomes == expected(large)
        assert len(model.steps) >= 6

    asyncio.run(scenario())


def test_two_hundred_jobs_at_once_get_their_own_rewards():
    async def scenario():
        engine = ScoringEngine(FakeModel(token_budget=300))
        engine.start()
        rng = random.Random(0)
        jobs = [
            job(*[group(*([rng.randrange(50)] * rng.randint(1, 40) for _ in range(rng.randint(1, 9)))) for _ in "abc"])
            for _ in range(200)
        ]
        await asyncio.gather(*(engine.run(one) for one in jobs))
        await engine.close()
        assert all(one.outcomes == expected(one) for one in jobs)

    asyncio.run(scenario())


def test_a_cancelled_job_is_not_computed():
    async def scenario():
        gate = Gate()
        model = FakeModel(on_forward=gate)
        engine = ScoringEngine(model)
        engine.start()
        first = asyncio.create_task(engine.run(job(sized_group(0, 1))))
        await entered(gate)
        gone = asyncio.create_task(engine.run(job(sized_group(0, 7))))
        await asyncio.sleep(0)
        gone.cancel()
        stays = asyncio.create_task(engine.run(job(sized_group(0, 3))))
        await asyncio.sleep(0)
        gate.open(2)
        await asyncio.gather(first, stays)
        await engine.close()
        assert gone.cancelled()
        assert [[len(r.ids) for members in step for r in members] for step in model.steps] == [[1], [3]]

    asyncio.run(scenario())


def test_a_fault_fails_its_response_only_and_the_engine_continues():
    async def scenario():
        engine = ScoringEngine(FakeModel(poisoned=666))
        engine.start()
        bad, good = job(group([1, 666], [1, 2])), job(group([3]))
        await asyncio.gather(engine.run(bad), engine.run(good))
        again = job(group([4]))
        await engine.run(again)
        assert engine.alive
        await engine.close()
        assert isinstance(bad.outcomes[0][0], ForwardFailedError)
        assert bad.outcomes[0][1] == reward_of(bad.groups[0][1])
        assert good.outcomes == expected(good)
        assert again.outcomes == expected(again)

    asyncio.run(scenario())


def test_close_finishes_accepted_jobs():
    async def scenario():
        gate = Gate()
        engine = ScoringEngine(FakeModel(on_forward=gate, token_budget=10))
        engine.start()
        jobs = [job(sized_group(0, 6)) for _ in range(4)]  # one a step
        runs = [asyncio.create_task(engine.run(one)) for one in jobs]
        await entered(gate)
        closing = asyncio.create_task(engine.close(drain_seconds=30))
        await asyncio.sleep(0)
        assert not engine.alive
        with pytest.raises(EngineStoppedError):
            await engine.run(job(sized_group(0, 1)))
        gate.open(10)
        await asyncio.gather(closing, *runs)
        assert all(one.outcomes == expected(one) for one in jobs)

    asyncio.run(scenario())


def test_close_fails_unfinished_jobs_after_the_drain_time():
    async def scenario():
        gate = Gate()
        engine = ScoringEngine(FakeModel(on_forward=gate, token_budget=10))
        engine.start()
        runs = [asyncio.create_task(engine.run(job(sized_group(0, 6)))) for _ in range(2)]
        await entered(gate)
        await engine.close(drain_seconds=0.05)
        results = await asyncio.gather(*runs, return_exceptions=True)
        assert [type(result) for result in results] == [EngineStoppedError] * 2
        gate.open(10)

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_fails_waiting_and_later_jobs():
    class Fatal(BaseException):
        pass

    def die(groups):
        raise Fatal

    async def scenario():
        engine = ScoringEngine(FakeModel(on_forward=die))
        engine.start()
        with pytest.raises(EngineStoppedError, match="died"):
            await asyncio.wait_for(engine.run(job(sized_group(0, 1))), 30)
        assert not engine.alive
        with pytest.raises(EngineStoppedError):
            await engine.run(job(sized_group(0, 1)))
        await engine.close()

    asyncio.run(scenario())


def test_an_empty_job_is_done_at_once_and_an_unused_engine_closes():
    async def scenario():
        engine = ScoringEngine(FakeModel())
        await engine.close()
        other = ScoringEngine(FakeModel())
        other.start()
        await other.run(job())
        await other.close()

    asyncio.run(scenario())


def test_background_work_runs_in_pieces_between_steps_and_returns_its_result():
    async def scenario():
        gate, order = Gate(), []
        engine = ScoringEngine(
            FakeModel(token_budget=10, on_forward=lambda groups: (gate(groups), order.append("step")))
        )
        engine.start()

        def work():
            for _ in range(2):
                order.append("piece")
                yield
            return "done"

        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(engine.run(job(sized_group(9, 1)))) for _ in range(3)]
            await entered(gate)
            background = tasks.create_task(engine.interleave(work()))
            await asyncio.sleep(0)
            gate.open(3)
        assert background.result() == "done"
        assert all(one.done() for one in jobs)
        assert order == ["step", "piece", "step", "piece", "step"]
        await engine.close()

    asyncio.run(scenario())


def test_background_work_ends_with_its_task_with_its_error_and_with_the_engine():
    async def scenario():
        engine, begun, ended = ScoringEngine(FakeModel()), asyncio.Event(), []
        loop = asyncio.get_running_loop()
        engine.start()

        def endless(name):
            try:
                while True:
                    loop.call_soon_threadsafe(begun.set)
                    yield
            finally:
                ended.append(name)

        def failing():
            yield
            raise ValueError("no compiler")

        waiting = asyncio.create_task(engine.interleave(endless("cancelled")))
        await begun.wait()
        waiting.cancel()
        with pytest.raises(ValueError, match="no compiler"):
            await engine.interleave(failing())
        assert ended == ["cancelled"]
        last = asyncio.create_task(engine.interleave(endless("closed")))
        await asyncio.sleep(0)
        await engine.run(job(sized_group(3, 1)))
        await engine.close()
        with pytest.raises(EngineStoppedError):
            await last
        with pytest.raises(EngineStoppedError):
            await engine.interleave(failing())

    asyncio.run(scenario())
