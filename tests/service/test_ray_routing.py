"""Ray Serve's parts without a cluster: keys of prompts, order of replicas, proxy middleware, scaling, merged metrics."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

pytest.importorskip("ray", reason="needs the extra: pip install -c constraints.txt -e '.[ray]'")

from marginrm_service.ray_serve.affinity import homes as homes_of
from marginrm_service.ray_serve.affinity import preference, with_room_first
from marginrm_service.ray_serve.prompt_key import RequestKeys, request_keys
from marginrm_service.ray_serve.proxy import MODEL_HEADER, SESSION_HEADER, PromptAffinity
from marginrm_service.ray_serve.router import PromptRouter
from marginrm_service.ray_serve.scaling import QueuedTokens
from marginrm_service.telemetry.metrics import Metrics
from marginrm_service.telemetry.replicas import Snapshot, exposition

CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
MESSAGES = [{"role": "user", "content": "P"}]
# The bodies of each contract, as its client sends them: prompt and response go where these functions put them.
BODIES: dict[str, Any] = {
    "/score pairs": lambda p, r: {"pairs": [{"prompt": p, "chosen": r, "rejected": "no"}]},
    "/score items": lambda p, r: {"items": [{"prompt": p, "response": r}]},
    "/best-of-n": lambda p, r: {"prompts": [{"prompt": p, "candidates": [r, "no"]}]},
    "OpenRLHF": lambda p, r: {"query": [CHATML.format(p, r)], "prompts": [p], "labels": [""]},
    "slime": lambda p, r: {"prompt": p, "response": r, "label": None},
    "slime messages": lambda p, r: {"prompt": [{"role": "user", "content": p}], "response": r},
    "verl": lambda p, r: {"model": "m", "input": CHATML.format(p, r), "use_activation": False},
    "SGLang": lambda p, r: {"model": "m", "text": CHATML.format(p, r)},
    "vLLM score": lambda p, r: {"text_1": p, "text_2": [r]},
    "vLLM queries": lambda p, r: {"queries": [p], "items": [r]},
    "rerank": lambda p, r: {"query": p, "documents": [r]},
    "TEI predict": lambda p, r: {"inputs": [[p, r]]},
    "LLaMA-Factory": lambda p, r: {"model": "m", "messages": [CHATML.format(p, r)]},
    "chat": lambda p, r: {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]},
    "NeMo-Gym": lambda p, r: {"conversation_history": [{"role": "user", "content": p}], "response_objs": [{"x": r}]},
    "NeMo-Gym verify": lambda p, r: {
        "responses_create_params": {"input": [{"role": "user", "content": p}]},
        "response": r,
    },
}


def key(body: Any) -> str | None:
    return request_keys(json.dumps(body).encode()).prompt


@pytest.mark.parametrize("contract", BODIES)
def test_requests_with_one_prompt_have_one_key_in_every_contract(contract: str) -> None:
    body = BODIES[contract]
    first = key(body("What is 2 + 2?", "4"))
    assert first is not None
    assert first == key(body("What is 2 + 2?", "Five, I think. " * 20))
    assert first != key(body("What is 2 + 3?", "4"))
    assert first != key({**body("What is 2 + 2?", "4"), "model": "another"})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"{}", b'{"prompt": 3}', b'{"pairs": []}', b"\xff\xfe"])
def test_a_body_without_a_prompt_has_no_key(body: bytes) -> None:
    assert request_keys(body) == RequestKeys()


def test_keys_spread_evenly_and_a_new_replica_moves_only_its_share() -> None:
    replicas = [f"replica-{index}" for index in range(4)]
    homes = {str(number): preference(str(number), replicas)[0] for number in range(4_000)}
    assert all(900 < count < 1_100 for count in Counter(homes.values()).values())
    grown = {number: preference(number, [*replicas, "new"])[0] for number in homes}
    moved = {number for number in homes if grown[number] != homes[number]}
    assert {grown[number] for number in moved} == {"new"}
    assert 700 < len(moved) < 900


@given(st.lists(st.integers(0, 200), min_size=1, max_size=20), st.integers(0, 10))
def test_a_replica_with_room_comes_first_and_one_above_the_bound_never(loads: list[int], free: int) -> None:
    order = [str(index) for index in range(len(loads))]
    named = dict(zip(order, loads, strict=True))
    tried = with_room_first(order, named, load_factor=1.25, free_requests=free)
    assert sorted(tried) == sorted(order)
    assert named[tried[0]] < max(free, 1.25 * (sum(loads) + 1) / len(loads))
    with_room = [name for name in order if named[name] < max(free, 1.25 * (sum(loads) + 1) / len(loads))]
    assert tried[0] == with_room[0]


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 6))
def test_each_model_has_homes_and_no_replica_more_models_than_places(models: int, replicas: int, places: int) -> None:
    names, machines = [f"m{index}" for index in range(models)], [f"r{index}" for index in range(replicas)]
    found = homes_of(names, machines, places)
    held = Counter(replica for chosen in found.values() for replica in chosen)
    assert all(found.values())
    assert all(len(set(chosen)) == len(chosen) for chosen in found.values())
    if replicas * places >= models:
        assert max(held.values()) <= places
    assert homes_of(names, reversed(machines), places) == found
    # The places are used: a model that is missing from a replica finds it full, or has no other home than it needs.
    free = [replica for replica in machines if held[replica] < places]
    assert all(replica in chosen for chosen in found.values() for replica in free)


def test_arguments_of_the_router_are_checked() -> None:
    router = object.__new__(PromptRouter)
    with pytest.raises(ValueError, match=r"load_factor is 1\.0; it must be above 1"):
        router.initialize_state(load_factor=1.0)
    with pytest.raises(ValueError, match="unknown request_router_kwargs: virtual_nodes"):
        router.initialize_state(virtual_nodes=3)


def test_a_request_goes_to_the_replicas_of_its_model() -> None:
    router = object.__new__(PromptRouter)
    router.initialize_state(models=["a", "b"], models_per_replica=1)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda _: 0)
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("x", "y")]

    def chosen(model: str, session: str) -> list[str]:
        metadata = SimpleNamespace(session_id=session, multiplexed_model_id=model)
        pending = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))
        (rank, *_) = asyncio.run(router.choose_replicas(replicas, pending))
        return [replica.replica_id.unique_id for replica in rank]

    homes = {model: chosen(model, "") for model in ("a", "b")}
    assert sorted(homes["a"] + homes["b"]) == ["x", "y"]
    for model, home in (("a", homes["a"]), ("b", homes["b"]), ("", homes["a"]), ("default", homes["a"])):
        assert all(chosen(model, str(prompt)) == home for prompt in range(8))
    assert sorted(chosen("unknown", "")) == ["x", "y"]


def test_replicas_are_asked_for_by_queued_tokens() -> None:
    policy = QueuedTokens(tokens_per_replica=1_000)
    asked, state = policy(SimpleNamespace(aggregated_metrics={"queued_tokens": {"a": 2_500.0, "b": 500.0}}))
    assert (asked, state) == (3.0, {})
    assert policy(SimpleNamespace(aggregated_metrics={}, target_num_replicas=2))[0] == 2
    with pytest.raises(ValueError, match="tokens_per_replica is 0; it must be above 0"):
        QueuedTokens(0)


class Proxy:
    """Stands where Ray's proxy does: reads the request, and answers from the given attempt on."""

    def __init__(self, answers_from: int = 1) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.models: list[str | None] = []
        self._answers_from = answers_from

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        names = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.models.append(names.get(MODEL_HEADER))
        self.seen.append((names.get(SESSION_HEADER, ""), body))
        scope["headers"].append((b"x-request-id", b"1"))  # as Ray does
        if len(self.seen) >= self._answers_from:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"fine"})


def call(proxy: Proxy, parts: list[bytes], path: str = "/score", **headers: str) -> list[Message]:
    """Sends a request in parts; returns what the client receives."""
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    waiting[-1]["more_body"] = False
    stated = {"content-length": str(sum(map(len, parts))), **headers}
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in stated.items() if value]
    scope = {"type": "http", "method": "POST", "path": path, "headers": named}
    sent: list[Message] = []

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        return await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(PromptAffinity(proxy)(scope, receive, send), 30))
    assert [name for name, _ in named] == [name for name, _ in scope["headers"]]  # the caller's scope is untouched
    return sent


BODY = json.dumps({"items": [{"prompt": "P", "response": "R"}]}).encode()


def test_a_request_reaches_the_replica_whole_and_with_its_key() -> None:
    proxy = Proxy()
    assert call(proxy, [BODY[:10], BODY[10:]])[0]["status"] == 200
    assert proxy.seen == [(request_keys(BODY).prompt, BODY)]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x_session_id": "mine"}, "mine"),
        ({"content_encoding": "gzip"}, ""),
        ({"content-length": ""}, ""),
        ({"path": "/another/application"}, ""),
    ],
)
def test_a_request_without_a_readable_prompt_or_with_a_session_is_left_as_it_is(
    headers: dict[str, str], expected: str
) -> None:
    proxy = Proxy()
    call(proxy, [BODY], **headers)
    assert proxy.seen == [(expected, BODY)]


def test_a_request_is_sent_again_when_its_replica_dies_and_refused_after_three_attempts() -> None:
    proxy = Proxy(answers_from=3)
    assert call(proxy, [BODY])[1]["body"] == b"fine"
    assert proxy.seen == [(request_keys(BODY).prompt, BODY)] * 3
    start, content = call(Proxy(answers_from=4), [BODY])
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(content["body"])["error"]["code"] == "not_ready"


def test_the_model_of_a_request_is_in_rays_header_unless_its_name_is_not_valid() -> None:
    for model, header in (("a.b-1", "a.b-1"), ("org/name", None), (3, None)):
        proxy = Proxy()
        call(proxy, [json.dumps({"model": model, "items": []}).encode()])
        assert proxy.models == [header]


def test_a_body_that_is_not_held_is_sent_once() -> None:
    large = Proxy(answers_from=2)
    assert call(large, [BODY, b" " * (4 * 2**20)])[0]["status"] == 503
    assert len(large.seen) == 1


def test_the_metrics_of_replicas_are_one_exposition_with_each_family_once() -> None:
    replicas = []
    for replica, requests in (("a", 1), ("b", 2)):
        metrics = Metrics()
        for _ in range(requests):
            metrics.answered("/score", "POST", 200, 0.1)
        metrics.compared("default", [])
        replicas.append(Snapshot(replica, list(metrics.collect())))
    text = exposition(replicas).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE marginrm_requests_total ") == 1
    counts = {s.labels["replica"]: s.value for s in families["marginrm_requests"].samples if s.name.endswith("_total")}
    assert counts == {"a": 1, "b": 2}
    buckets = [s for s in families["marginrm_request_seconds"].samples if s.name.endswith("_bucket")]
    assert {s.labels["replica"] for s in buckets} == {"a", "b"}
