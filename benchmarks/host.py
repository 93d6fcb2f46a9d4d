"""`python -m benchmarks.host`: computed tokens per second that library and server can feed a model, and where time goes.

The model is a decoder of one tiny layer, so nearly all time is the host's. The library gets one core: texts in, rewards
out. The server and its clients share two. Each workload gets two lines, and the last line of all is JSON. The library and
the stages are timed in CPU seconds, so that other processes on the machine hardly matter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import psutil
import torch
import typer

from benchmarks.harness.command import DataFolder, all_known, app_of
from benchmarks.harness.server import ServerProcess, marginrm_command
from benchmarks.harness.texts import TokenizedGroup, load_texts
from benchmarks.harness.workloads import CLIENTS, WORKLOADS, Samples
from benchmarks.models import HOST, build
from benchmarks.reliability.light_client import LightClient
from benchmarks.throughput.scorers.classify_client import REPLY_SECONDS, send_all
from marginrm import RewardModel
from marginrm.encoding import EncodedGroup, EncodedResponse
from marginrm.errors import EncodingError
from marginrm.forward.batch import Batch
from marginrm.forward.module import RewardModule
from marginrm.schemas import BestOfNRequest, ScoreRequest, Usage
from marginrm.steps import plan_steps
from marginrm_service.api.replies import best_of_n_groups, best_of_n_reply, score_groups, score_reply
from marginrm_service.engine.request import Result, ScoredResponse, ScoringResult, TextGroup, Timings
from marginrm_service.models.tokenising import encode_unless_oversized

_COMPUTED = "marginrm_tokens_computed_total"
_STAGES = ("JSON and validation", "tokenising", "planning", "forward", "delivery")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as its client sends it."""

    path: str
    body: bytes


class Stages:
    """Runs requests through the code of each stage, one after the other in this thread, and times them apart.

    Args:
        model: The model.

    Attributes:
        seconds: Seconds by stage.
        computed: Tokens that the model computed.
    """

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self.seconds = dict.fromkeys(_STAGES, 0.0)
        self.computed = 0

    def run(self, requests: Sequence[Request]) -> list[str]:
        """Scores the requests together, and returns the replies."""
        parsed = [self._timed("JSON and validation", partial(_parsed, one)) for one in requests]
        encoded = [self._timed("tokenising", partial(self.encode, groups)) for _, groups in parsed]
        rewards = iter(self.score([group for groups in encoded for group in groups]))
        scored = [[(group, next(rewards)) for group in groups] for groups in encoded]
        return [
            self._timed("delivery", partial(self._reply, body, groups))
            for (body, _), groups in zip(parsed, scored, strict=True)
        ]

    def encode(self, groups: Sequence[TextGroup]) -> list[EncodedGroup]:
        """Encodes the texts of a request as the server does."""
        found: list[EncodedGroup] = []
        for group in groups:
            outcomes = encode_unless_oversized(self._model.encoder, group, "error")
            usable = [one for one in outcomes if isinstance(one, EncodedResponse)]
            if len(usable) < len(outcomes):
                raise ValueError(f"a text cannot be encoded: {outcomes}")
            found.append(usable)
        return found

    def score(self, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        """Scores encoded groups in as many steps as the model's token budget requires."""
        model, module = self._model, self._model.module
        rewards: list[list[float]] = [[] for _ in groups]
        ids = [[response.array for response in group] for group in groups]
        steps = plan_steps(ids, model.token_budget, path=model.forward_path, share_prefix=model.shares_prefixes)
        for step in self._timed("planning", lambda: list(steps)):
            parts = [groups[part.group][part.start : part.stop] for part in step]
            batch = self._timed("planning", partial(module.collate, parts, multiple=model.row_multiple))
            with torch.inference_mode():
                values = self._timed("forward", partial(_values, module, batch))
            self.computed += sum(batch.costs)
            rest = iter(values)
            for part in step:
                rewards[part.group] += islice(rest, part.stop - part.start)
        return rewards

    def _reply(self, body: ScoreRequest | BestOfNRequest, scored: Sequence[tuple[EncodedGroup, list[float]]]) -> str:
        results: list[list[Result]] = [
            [ScoredResponse(reward, one.tokens, one.truncated) for one, reward in zip(group, found, strict=True)]
            for group, found in scored
        ]
        usage = Usage(responses=len(results), tokens=0, tokens_computed=0)
        result = ScoringResult(self._model.info, results, usage, Timings(0, 0, 0, 0))
        reply = score_reply(body, result) if isinstance(body, ScoreRequest) else best_of_n_reply(body, result)
        return reply.model_dump_json()

    def _timed(self, stage: str, function: Callable[[], _T]) -> _T:
        started = time.process_time()
        try:
            return function()
        finally:
            self.seconds[stage] += time.process_time() - started


def _values(module: RewardModule, batch: Batch) -> list[float]:
    values: list[float] = module(batch).tolist()
    return values


def library_rate(model: RewardModel, groups: Sequence[TokenizedGroup]) -> tuple[float, float]:
    """Returns tokens per second from texts to rewards, and microseconds of planning a token, on one core."""
    stages = Stages(model)
    started = time.process_time()
    encoded = []
    for group in groups:
        outcomes = model.encoder.encode_group(group.prompt, group.responses)
        encoded.append([one for one in outcomes if not isinstance(one, EncodingError)])
    model.score_encoded(encoded)
    seconds = time.process_time() - started
    stages.score(encoded)
    return stages.computed / seconds, stages.seconds["planning"] / stages.computed * 1e6


def requests_of(groups: Sequence[TokenizedGroup]) -> list[Request]:
    """Returns one request for each group: a pair to `/score`, candidates to `/best-of-n`."""
    requests = []
    for group in groups:
        body: dict[str, Any]
        if len(group.responses) == 2:
            chosen, rejected = group.responses
            body = {"pairs": [{"prompt": group.prompt, "chosen": chosen, "rejected": rejected}]}
            requests.append(Request("/score", json.dumps(body).encode()))
        else:
            body = {"prompts": [{"prompt": group.prompt, "candidates": list(group.responses)}]}
            requests.append(Request("/best-of-n", json.dumps(body).encode()))
    return requests


def _parsed(request: Request) -> tuple[ScoreRequest | BestOfNRequest, list[TextGroup]]:
    if request.path == "/score":
        pairs = ScoreRequest.model_validate_json(request.body)
        return pairs, score_groups(pairs)
    candidates = BestOfNRequest.model_validate_json(request.body)
    return candidates, best_of_n_groups(candidates)


def served(server: ServerProcess, requests: Sequence[Request], clients: int) -> dict[str, float]:
    """Sends all requests from concurrent clients; returns tokens per second and CPU seconds of both sides."""
    process, here = psutil.Process(server.process.pid), psutil.Process()
    before, used = server.metric(_COMPUTED), [_cpu(process), _cpu(here)]
    started = time.perf_counter()
    asyncio.run(_send(server.url, requests, clients))
    seconds = time.perf_counter() - started
    used = [_cpu(process) - used[0], _cpu(here) - used[1]]
    computed = server.metric(_COMPUTED) - before
    return {
        "rate": computed / seconds,
        "per_core": computed / sum(used),
        "server": used[0] / computed,
        "client": used[1] / computed,
    }


async def _send(url: str, requests: Sequence[Request], clients: int) -> None:
    async with LightClient(url, REPLY_SECONDS) as client:

        async def send(request: Request) -> None:
            reply = await client.post(request.path, request.body)
            if reply.status != HTTPStatus.OK:
                raise RuntimeError(f"{request.path} replied {reply.status}: {reply.body!r}")

        await send_all([[request] for request in requests], send, clients)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main(
    workloads: Annotated[str, typer.Option(help="Comma-separated: pairs, bon-short, bon-long.")] = "pairs,bon-long",
    clients: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = CLIENTS,
    rounds: Annotated[int, typer.Option(help="Rounds; each takes new texts, and the median counts.", min=1)] = 5,
    scale: Annotated[int, typer.Option(help="Samples of a workload in a round.", min=1)] = 3,
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("runs/bench"),
) -> None:
    """Measure what library and server can feed to a model of next to no computation."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    texts = load_texts(data)
    folder = build(HOST, output / "models", texts.for_tokenizer)
    samples = Samples(folder, texts)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: dict[str, Any] = {}
    torch.set_num_threads(1)
    model = RewardModel.from_pretrained(folder, dtype="float32")
    model.measure_token_budget()
    model.encoder.token_ids.load()
    names = all_known(workloads, WORKLOADS)
    with TemporaryDirectory(prefix="benchmark-host-") as logs:
        os.sched_setaffinity(0, cores)
        command = marginrm_command("--model", str(folder), "--dtype", "float32")
        with ServerProcess(command, Path(logs, "log"), ready="/readyz") as server:
            for name in names:
                rounds_of = [
                    [
                        group
                        for part in range(scale)
                        for group in samples.sample(WORKLOADS[name], number * scale + part).groups
                    ]
                    for number in range(3 * rounds + 1)
                ]
                found[name] = _measure(model, server, rounds_of, clients, cores)
                typer.echo(_lines(name, found[name], len(cores)))
    typer.echo(json.dumps(found))


def _measure(
    model: RewardModel,
    server: ServerProcess,
    rounds: Sequence[Sequence[TokenizedGroup]],
    clients: int,
    cores: Sequence[int],
) -> dict[str, Any]:
    """Measures library, stages and server in turn, each with texts of its own; the first round is the warm-up."""
    library, planning, over_http = [], [], []
    stages = Stages(model)
    for groups, kind in zip(rounds[1:], cycle(("library", "stages", "http")), strict=False):
        if kind == "http":
            over_http.append(served(server, requests_of(groups), clients))
            continue
        os.sched_setaffinity(0, cores[:1])
        if kind == "library":
            rate, cost = library_rate(model, groups)
            library.append(rate)
            planning.append(cost)
        else:
            stages.run(requests_of(groups))
        os.sched_setaffinity(0, cores)
    return {
        "library_tokens_per_second": median(library),
        "http_tokens_per_second": median(one["rate"] for one in over_http),
        "http_tokens_per_core_second": median(one["per_core"] for one in over_http),
        "planning_us": median(planning),
        "stage_us": {name: stages.seconds[name] / stages.computed * 1e6 for name in _STAGES},
        "server_us": median(one["server"] for one in over_http) * 1e6,
        "client_us": median(one["client"] for one in over_http) * 1e6,
    }


def _lines(name: str, found: dict[str, Any], cores: int) -> str:
    us = found["stage_us"]
    texts_to_rewards = us["tokenising"] + us["planning"] + us["forward"]
    shares = ", ".join(f"{stage} {us[stage] / texts_to_rewards:.0%}" for stage in ("tokenising", "planning", "forward"))
    both = found["server_us"] + found["client_us"]
    rest = found["server_us"] - sum(us.values())
    parts = [*us.items(), ("HTTP, event loop and queue", rest), ("clients", found["client_us"])]
    return (
        f"{name}, library, 1 core: {found['library_tokens_per_second']:,.0f} computed tokens/s "
        f"({shares}); planning {found['planning_us']:.3f} us a token\n"
        f"{name}, HTTP, {cores} cores: {found['http_tokens_per_second']:,.0f} computed tokens/s, "
        f"{found['http_tokens_per_core_second']:,.0f} per second of a core "
        f"({', '.join(f'{stage} {value / both:.0%}' for stage, value in parts)})"
    )


if __name__ == "__main__":
    app_of(main)()
