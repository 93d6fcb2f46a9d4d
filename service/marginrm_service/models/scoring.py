"""The one path from texts to rewards: admit, encode, take known rewards, compute the rest, gather the results.

`/score`, `/best-of-n` and every adapter score here; they differ in the shapes of request and reply only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from time import perf_counter

from marginrm.confidence.uncertain_reward import UncertainReward
from marginrm.encoding import EncodedResponse
from marginrm.errors import MarginRMError
from marginrm.process_rewards import steps_of
from marginrm.schemas import Usage
from marginrm_service.engine.job import Job, Outcome
from marginrm_service.engine.request import (
    GroupResult,
    OnGroup,
    Result,
    Reuse,
    ScoredResponse,
    ScoringRequest,
    ScoringResult,
    TextGroup,
    Timings,
)
from marginrm_service.engine.reward_cache import PositionsByKey, positions_by_key
from marginrm_service.models.served_model import ServedModel
from marginrm_service.models.tokenising import Encoded, encode, text_length

_FEW = 4  # responses of which a job is made sooner than a thread is woken


async def score(
    model: ServedModel, request: ScoringRequest, pool: Executor, on_group: OnGroup | None = None
) -> ScoringResult:
    """Scores the responses of a request.

    Args:
        model: The model. Hold a lease on it, so that it finishes this request even if it is replaced meanwhile.
        request: The texts, and how they are to be scored.
        pool: Threads that tokenise.
        on_group: Called on the event loop with the results of each group, as soon as all of them are known.

    Raises:
        UnavailableError: The model takes no further requests now.
        RequestTooLargeError: The request alone exceeds the queue.
    """
    admission = model.admission
    characters = _characters(request.groups, shared=model.shares_prefixes)
    with admission.acquire(admission.expected_tokens(characters), request.seconds, bulk=request.bulk) as permit:
        started = perf_counter()
        encoded = await encode(model.encoder, request.groups, request.truncation, pool)
        if sum(map(len, encoded)) <= _FEW:
            job, positions = _job_of(encoded, model, request.tenant)
        else:
            loop = asyncio.get_running_loop()
            job, positions = await loop.run_in_executor(pool, _job_of, encoded, model, request.tenant)
        tokenised = perf_counter()
        admission.observe_characters_per_token(characters, job.cost)
        job.bulk = request.bulk
        job.on_computed = permit.release
        if on_group:
            _announce(encoded, job, model, on_group)
        reuse: Reuse | None = None
        if model.coalescer:
            with model.coalescer.open(job, positions) as shared:
                while part := await shared.next_part():
                    permit.set_cost(part.cost)
                    await model.engine.run(part)
            reuse = shared.reuse
        else:
            permit.set_cost(job.cost)
            await model.engine.run(job)
    queued = (job.started_at or job.queued_at) - job.queued_at
    timings = Timings(tokenised - started, queued, job.forward_seconds, perf_counter() - started)
    results = _gather(encoded, job)
    return ScoringResult(model.info, results, _usage(results, job), timings, reuse)


def _characters(groups: Sequence[TextGroup], *, shared: bool) -> int:
    """Returns the number of characters to compute: a shared prompt once, any other with each response."""
    return sum(
        text_length(group.prompt) * (1 if shared else len(group.responses)) + sum(map(text_length, group.responses))
        for group in groups
    )


def _job_of(encoded: Sequence[Sequence[Encoded]], model: ServedModel, tenant: str) -> tuple[Job, PositionsByKey]:
    """Returns the job of all responses that could be encoded, and their positions if rewards are reused."""
    groups = [usable for outcomes in encoded if (usable := _usable(outcomes))]
    job = Job.of(groups, share_prefix=model.shares_prefixes, tenant=tenant)
    for group in range(len(groups)):
        job.look_up(group, model.cached_tokens)
    return job, positions_by_key(groups) if model.coalescer else {}


def _announce(encoded: Sequence[Sequence[Encoded]], job: Job, model: ServedModel, on_group: OnGroup) -> None:
    """Makes a job call `on_group` for each group that is complete; groups without anything to compute are complete."""
    indices: list[int] = []  # of the request's groups, by the job's
    for index, outcomes in enumerate(encoded):
        if _usable(outcomes):
            indices.append(index)
        else:
            on_group(GroupResult(index, _results(outcomes, iter(())), model.info))

    def complete(group: int) -> None:
        index = indices[group]
        on_group(GroupResult(index, _results(encoded[index], iter(job.outcomes[group])), model.info))

    job.on_group = complete


def _gather(encoded: Sequence[Sequence[Encoded]], job: Job) -> list[list[Result]]:
    """Puts rewards and errors at the positions of their responses."""
    rewards = iter([outcome for outcomes in job.outcomes for outcome in outcomes])
    return [_results(outcomes, rewards) for outcomes in encoded]


def _usable(outcomes: Sequence[Encoded]) -> list[EncodedResponse]:
    return [one for one in outcomes if isinstance(one, EncodedResponse)]


def _results(outcomes: Sequence[Encoded], rewards: Iterator[Outcome | None]) -> list[Result]:
    """Returns the results of one group, taking the next reward for each response that could be encoded."""
    results: list[Result] = []
    for one in outcomes:
        if not isinstance(one, EncodedResponse):
            results.append(one)
            continue
        reward = next(rewards)
        assert reward is not None  # the group is complete
        if isinstance(reward, MarginRMError):
            results.append(reward)
        else:
            kept = reward if isinstance(reward, UncertainReward) else float(reward)
            results.append(ScoredResponse(kept, one.tokens, one.truncated, steps_of(reward)))
    return results


def _usage(results: Sequence[Sequence[Result]], job: Job) -> Usage:
    scored = [one for group in results for one in group if isinstance(one, ScoredResponse)]
    return Usage(responses=len(scored), tokens=sum(one.tokens for one in scored), tokens_computed=job.computed)
