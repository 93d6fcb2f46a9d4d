"""The one path from texts to rewards: admit, encode off the event loop, run on the engine, gather the outcomes.

`/score`, `/best-of-n` and every adapter ask here; what differs between them is the shape of question and answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from time import perf_counter
from typing import Any, TypeVar

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import MarginRMError, SequenceTooLongError
from marginrm.schemas import Usage
from marginrm.text import Truncation
from marginrm_service.engine.job import Job, Outcome
from marginrm_service.engine.request import Answer, Ask, Result, Scored, Stages
from marginrm_service.engine.reward_cache import places_of
from marginrm_service.models.served_model import ServedModel
from marginrm_service.models.tokenising import Encoded, encode_group, encode_text

# What one call in the encoding pool takes at most: little enough that a lone pair soon gets its turn.
_CHUNK_RESPONSES = 64
_CHUNK_CHARACTERS = 200_000
# No tokenizer in use packs more characters than this into each token of a real text (the longest tokens are runs of
# spaces). A text beyond it cannot fit, and is refused before time is spent on tokenising it.
_CHARACTERS_PER_TOKEN = 64

T = TypeVar("T")
OnAsk = Callable[[int, list[Result]], None]


async def score(
    model: ServedModel,
    asks: Sequence[Ask],
    truncation: Truncation,
    pool: Executor,
    *,
    bulk: bool = False,
    seconds: float = math.inf,
    on_ask: OnAsk | None = None,
) -> Answer:
    """Scores responses.

    Args:
        model: What to score with. It finishes this request even if it is replaced meanwhile.
        asks: Prompts with their responses; each is one group, whose prompt is computed once.
        truncation: What to do with what is too long.
        pool: Threads that tokenise.
        bulk: Whether it takes the room that interactive work leaves.
        seconds: How long it may take.
        on_ask: Called on the event loop with the number of an ask and its results, as soon as it has all of them.

    Raises:
        UnavailableError: The model takes no more requests now.
        RequestTooLargeError: It never will take one as large as this.
    """
    characters = _characters(asks, shared=model.shares_prefixes)
    with model.admit(characters, seconds, bulk=bulk) as permit:
        started = perf_counter()
        encoded: list[list[Encoded]] = [[] for _ in asks]
        for chunk in _chunks(asks):
            await _in(pool, _encode_chunk, model.encoder, asks, chunk, truncation, encoded)
        job = await _in(pool, _job, encoded, model.shares_prefixes, model.reuses)
        tokenised = perf_counter()
        model.learn(characters, job.cost)
        job.bulk = bulk
        job.on_computed = permit.spend
        if on_ask:
            _announce(encoded, job, on_ask)
        await model.run(job, permit)
    results = _gather(encoded, job)
    waited = (job.started_at or job.queued_at) - job.queued_at
    stages = Stages(tokenised - started, waited, job.forward_seconds, perf_counter() - started)
    scored = [one for outcomes in results for one in outcomes if isinstance(one, Scored)]
    usage = Usage(responses=len(scored), tokens=sum(one.tokens for one in scored), tokens_computed=job.computed)
    return Answer(results, usage, stages)


def _chunks(asks: Sequence[Ask]) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts a request into parts for the encoding pool: (number of the ask, first response, last response + 1)."""
    chunk: list[tuple[int, int, int]] = []
    responses = characters = 0
    for number, ask in enumerate(asks):
        base = text_length(ask.prompt)
        start = 0
        for index, response in enumerate(ask.responses):
            size = base + text_length(response)
            if responses and (responses >= _CHUNK_RESPONSES or characters + size > _CHUNK_CHARACTERS):
                yield [*chunk, (number, start, index)] if index > start else chunk
                chunk, start, responses, characters = [], index, 0, 0
            responses, characters = responses + 1, characters + size
        chunk.append((number, start, len(ask.responses)))
    yield chunk


def _encode_chunk(
    encoder: Encoder,
    asks: Sequence[Ask],
    chunk: Sequence[tuple[int, int, int]],
    truncation: Truncation,
    encoded: list[list[Encoded]],
) -> None:
    for number, start, stop in chunk:
        ask = asks[number]
        responses = ask.responses[start:stop]
        encoded[number] += encode_within_reason(encoder, ask.prompt, responses, truncation, templated=ask.templated)


def encode_within_reason(
    encoder: Encoder, prompt: Any, responses: Sequence[Any], truncation: Truncation, *, templated: bool = False
) -> list[Encoded]:
    """Encodes responses to one prompt, except those that are so long that tokenising them would be a waste.

    Prompt and responses may be of any type: the encoder gives an error for what is no text. If they are `templated`,
    the responses are encoded as whole texts, without the prompt.
    """
    most = encoder.max_length * _CHARACTERS_PER_TOKEN
    base = text_length(prompt)
    lengths = [base + text_length(response) for response in responses]
    usable = [response for response, length in zip(responses, lengths, strict=True) if length <= most]
    if templated:
        found = iter([encode_text(encoder, text, truncation) for text in usable])
    else:
        found = iter(encode_group(encoder, prompt, usable, truncation) if usable else [])
    param = "prompt" if base > most else "response"
    return [
        next(found) if length <= most else _hopelessly_long(length, encoder.max_length, param) for length in lengths
    ]


def _hopelessly_long(characters: int, limit: int, param: str) -> SequenceTooLongError:
    return SequenceTooLongError(
        characters // _CHARACTERS_PER_TOKEN,
        limit,
        f"{characters:,} characters cannot fit into the {limit:,} tokens that this model takes. Shorten the {param}.",
        param=param,
    )


def text_length(value: Any) -> int:
    """Returns the characters of a text or of a list of messages; 0 for what is neither."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(len(m["content"]) for m in value if isinstance(m, dict) and isinstance(m.get("content"), str))
    return 0


def _characters(asks: Sequence[Ask], *, shared: bool) -> int:
    """Returns how many characters have to be computed: a shared prompt once, others with each response."""
    return sum(
        text_length(ask.prompt) * (1 if shared else len(ask.responses)) + sum(map(text_length, ask.responses))
        for ask in asks
    )


def _job(encoded: Sequence[Sequence[Encoded]], shares_prefixes: bool, reuses: bool) -> Job:
    groups = map(_usable, encoded)
    job = Job.of([group for group in groups if group], share_prefix=shares_prefixes)
    if reuses:
        job.places = places_of(job.groups)
    return job


async def _in(pool: Executor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _announce(encoded: Sequence[Sequence[Encoded]], job: Job, on_ask: OnAsk) -> None:
    """Tells of each ask when its group in the job is complete, and at once where there is nothing to compute."""
    numbers = []
    for number, outcomes in enumerate(encoded):
        if _usable(outcomes):
            numbers.append(number)
        else:
            on_ask(number, _results(outcomes, iter(())))
    job.on_group = lambda group: on_ask(numbers[group], _results(encoded[numbers[group]], iter(job.outcomes[group])))


def _gather(encoded: Sequence[Sequence[Encoded]], job: Job) -> list[list[Result]]:
    """Puts rewards and errors into the places of the responses that they belong to."""
    rewards = iter([outcome for outcomes in job.outcomes for outcome in outcomes])
    return [_results(outcomes, rewards) for outcomes in encoded]


def _usable(outcomes: Sequence[Encoded]) -> list[EncodedResponse]:
    return [one for one in outcomes if isinstance(one, EncodedResponse)]


def _results(outcomes: Sequence[Encoded], rewards: Iterator[Outcome | None]) -> list[Result]:
    """Returns one ask's results; takes a reward from the front for each response that could be encoded."""
    results: list[Result] = []
    for one in outcomes:
        if not isinstance(one, EncodedResponse):
            results.append(one)
            continue
        reward = next(rewards)
        assert reward is not None  # the engine resolves only what is complete
        results.append(reward if isinstance(reward, MarginRMError) else Scored(reward, len(one.ids), one.truncated))
    return results
