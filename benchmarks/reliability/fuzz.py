"""Generated invalid requests: no 500, no hang, no crash. Three kinds: from the OpenAPI document, bodies, raw bytes."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count as count_from
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.core.result import Ok

from benchmarks.reliability import checks, raw_http, traffic
from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import WORK, WatchedServer, model_paths, reference

_TIMEOUT = 30.0  # seconds; a longer request counts as hanging
_TOP_KEYS = ("model", "truncation", "tie_below", "top_k", "return_text", "pairs", "items", "prompts", "id", "prompt")
_KEYS = (*_TOP_KEYS, "chosen", "rejected", "response", "candidates", "role", "content")
_MODES = tuple(schemathesis.GenerationMode)
_ROUTES = ("/score", "/best-of-n")
_VALID: tuple[dict[str, Any], ...] = (
    {"pairs": [{"id": "a", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}], "tie_below": 0.6},
    {"items": [{"prompt": [{"role": "user", "content": "Why?"}], "response": "Because."}], "truncation": "prompt_left"},
    {"prompts": [{"prompt": "Why?", "candidates": ["a", "b", "c"]}], "top_k": 2, "return_text": True},
)
_TYPES = (
    "application/json",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "",
    "application/json; charset=utf-16",
)


def fuzz(requests: int) -> Report:
    """Runs all three kinds against one server.

    Args:
        requests: Number in all; at least a third of each kind.
    """
    path, _ = model_paths()
    (request,) = traffic.checked_requests([reference(path)], 1)
    each = -(-requests // 3)
    with WatchedServer(["--model", str(path), "--dtype", "float32"], WORK / "fuzz.log") as server:
        outcomes = {
            "schemathesis": from_schema(server.url, each),
            "Hypothesis bodies": bodies(server.url, each),
            "raw sockets": raw(server.url, each),
        }
        after = httpx.post(f"{server.url}/best-of-n", json=request.body, timeout=_TIMEOUT)
        ready = httpx.get(f"{server.url}/readyz", timeout=_TIMEOUT)
        tracebacks = server.log.count("Traceback")
        alive, rss = server.process.poll() is None, list(server.rss)
    every = [outcome for some in outcomes.values() for outcome in some]
    facts = {kind: f"{len(some):,} requests: {_statuses(some)}" for kind, some in outcomes.items()}
    healthy = alive and ready.status_code == 200 and after.status_code == 200 and not request.fault(after.json())
    return Report(
        "Bad and odd requests",
        f"python -m benchmarks.reliability fuzz --requests {requests}",
        facts,
        [
            no_faults(every),
            Check("no traceback in the log", f"{tracebacks:,}", not tracebacks),
            Check("afterwards it is ready and scores as before", str(healthy), healthy),
            checks.flat_memory(rss, 0.10),
        ],
    )


def no_faults(outcomes: Sequence[Outcome]) -> Check:
    """Checks that no request has a 5xx reply other than 503, or none in time."""
    failures = sum(
        outcome.status is not None and outcome.status >= 500 and outcome.status != 503 for outcome in outcomes
    )
    hung = sum(outcome.fault == "timeout" for outcome in outcomes)
    return Check(
        "no 5xx but 503, no hang", f"{failures:,} and {hung:,} of {len(outcomes):,}", not failures and not hung
    )


def from_schema(url: str, count: int, start: int = 0) -> list[Outcome]:
    """Sends requests that schemathesis generates from the server's OpenAPI document, valid and invalid."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    small = [operation.as_strategy() for operation in operations if not operation.body]
    large = [operation.as_strategy(mode) for operation in operations if operation.body for mode in _MODES]
    outcomes: list[Outcome] = []
    with httpx.Client(base_url=url, timeout=_TIMEOUT) as http:

        def send(case: Any) -> None:
            fields = {"method", "url", "headers", "params", "data", "json", "files"}
            arguments = {name: value for name, value in case.as_transport_kwargs(url).items() if name in fields}
            request = partial(_as_sent, http, arguments)
            outcomes.append(_sent("schemathesis", request))

        for strategy in small:  # these have few distinct requests
            _drawn(strategy, send, 10, start)
        share = -(-max(count - len(outcomes), 0) // len(large))
        for number in count_from(start):
            for strategy in large:
                _drawn(strategy, send, share, number)
            if len(outcomes) >= count:
                break
    return outcomes


def bodies(url: str, count: int, start: int = 0) -> list[Outcome]:
    """Sends valid, altered and arbitrary JSON to the scoring routes."""
    outcomes: list[Outcome] = []
    with httpx.Client(base_url=url, timeout=_TIMEOUT) as http:

        def send(drawn: tuple[str, bytes, str]) -> None:
            route, body, kind = drawn
            request = partial(http.post, route, content=body, headers={"content-type": kind})
            outcomes.append(_sent("body", request))

        drawn = st.tuples(st.sampled_from(_ROUTES), body_bytes(), st.sampled_from((*["application/json"] * 8, *_TYPES)))
        _drawn(drawn, send, count, start)
    return outcomes


def body_bytes() -> st.SearchStrategy[bytes]:
    """Returns bodies: valid ones with parts replaced, any JSON over the known keys, broken encodings, and random bytes."""
    texts = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(
        ["", " ", "\0", "\ud800", "<|end|>", "x" * 5000]
    )
    scalars = (
        st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**400, -0.0, 1e308, 2**63])
    )
    anything = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS) | texts, inner, max_size=5),
        max_leaves=12,
    )

    @st.composite
    def altered(draw: st.DrawFn) -> Any:
        body = json.loads(json.dumps(draw(st.sampled_from(_VALID))))
        for _ in range(draw(st.integers(1, 3))):
            _replace_one(body, draw(st.randoms(use_true_random=False)), draw(anything))
        return body

    as_json = (altered() | anything).map(_encoded)
    deep = st.integers(1, 20_000).map(lambda depth: b"[" * depth)
    cut = st.tuples(as_json, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(as_json, as_json, as_json, cut, deep, st.binary(max_size=200))


def raw(url: str, count: int, start: int = 0, threads: int = 8) -> list[Outcome]:
    """Sends malformed HTTP over plain sockets, several at a time."""
    generator = random.Random(start)
    messages = [raw_http.malformed(generator) for _ in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(partial(raw_http.send, url), messages))


def _drawn(strategy: st.SearchStrategy[Any], send: Callable[[Any], None], count: int, start: int) -> None:
    """Draws values from a strategy and sends them. Hypothesis is only the generator: failures are counted, not raised."""

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value: Any) -> None:
        send(value)

    draw()


def _as_sent(http: httpx.Client, arguments: dict[str, Any]) -> httpx.Response:
    data = arguments.pop("data", None)
    content = {"content": data} if isinstance(data, (bytes, str)) else {"data": data}
    return http.request(**arguments, **content)


def _sent(kind: str, request: Callable[[], httpx.Response]) -> Outcome:
    try:
        reply = request()
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, ValueError, TypeError):
        return Outcome(kind, None, 0.0, "not sendable")  # httpx refuses to send it
    except httpx.HTTPError as error:
        return Outcome(kind, None, 0.0, traffic.transport_fault(error))
    return Outcome(kind, reply.status_code, reply.elapsed.total_seconds(), "", "retry-after" in reply.headers)


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _replace_one(body: Any, generator: random.Random, value: Any) -> None:
    """Replaces a random part of a body by a value, or adds the value under a new key."""
    node = body
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            return
        place = generator.choice(places)
        inside = node[place]
        if not isinstance(inside, (dict, list)) or not inside or generator.random() < 0.3:
            if isinstance(node, dict) and generator.random() < 0.15:
                place = generator.choice(_KEYS)
            node[place] = value
            return
        node = inside


def _statuses(outcomes: Sequence[Outcome]) -> str:
    found = Counter(str(outcome.status or outcome.fault or "closed") for outcome in outcomes)
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))
