"""`POST /best-of-n` in lines: their order, the end of a stream, and its effect on the engine."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from marginrm_service.app import create_app
from marginrm_service.settings import Settings
from support.models import SENTENCES, tiny_checkpoint
from support.server import ServerProcess, serving
from support.service import FakeRewardModel, Gate

LINES = {"Accept": "application/x-ndjson"}
PROMPTS = [
    {"id": f"p{number}", "prompt": f"Question {number}?", "candidates": [f"Answer {number}.{n}" for n in range(5)]}
    for number in range(12)
]


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_lines_equal_the_plain_reply() -> None:
    body = {"prompts": PROMPTS, "top_k": 2}
    with serving(FakeRewardModel(), reward_cache_mib=0) as server:
        plain = httpx.post(f"{server.url}/best-of-n", json=body).json()
        response = httpx.post(f"{server.url}/best-of-n", json=body, headers=LINES)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/x-ndjson")
    *outcomes, end = lines_of(response)
    assert sorted(outcomes, key=lambda line: line["index"]) == plain["prompts"]
    assert end == {"model": plain["model"], "usage": plain["usage"]}


def test_a_line_comes_before_the_rest_is_computed() -> None:
    model, gate = FakeRewardModel(), Gate()
    model.token_budget = 60
    with serving(model) as server:
        model.on_forward = gate
        gate.open(2)  # of about six steps
        with httpx.stream("POST", f"{server.url}/best-of-n", json={"prompts": PROMPTS}, headers=LINES) as response:
            incoming = response.iter_lines()
            first = json.loads(next(incoming))
            assert first["ranking"]
            assert server.service.registry.get("default").queue_state().tokens > 0  # the worker waits for the gate
            model.on_forward = lambda _: None
            gate.open(2)
            rest = [json.loads(line) for line in incoming]
    assert len(rest) == len(PROMPTS)  # the other prompts and the last line


def test_a_disconnect_in_mid_stream_cancels_the_rest() -> None:
    model, gate = FakeRewardModel(), Gate()
    model.token_budget = 60
    with serving(model) as server:
        queue_state = server.service.registry.get("default").queue_state
        model.on_forward = gate
        gate.open(2)  # of about six steps
        with httpx.stream("POST", f"{server.url}/best-of-n", json={"prompts": PROMPTS}, headers=LINES) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 120
        while queue_state().requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (queue_state().requests, queue_state().tokens) == (0, 0)
        steps = len(model.steps)
        model.on_forward = lambda _: None
        gate.open(2)
        assert httpx.post(f"{server.url}/best-of-n", json={"prompts": PROMPTS[:1]}).status_code == 200
        assert len(model.steps) <= steps + 2  # what was left of the stream was not computed


def test_a_refusal_before_the_first_line_has_its_own_status() -> None:
    with serving(FakeRewardModel()) as server:
        unknown = httpx.post(f"{server.url}/best-of-n", json={"model": "x", "prompts": PROMPTS}, headers=LINES)
        late = {**LINES, "X-Request-Timeout": "soon"}
        invalid = httpx.post(f"{server.url}/best-of-n", json={"prompts": PROMPTS}, headers=late)
    assert unknown.status_code == 404
    assert invalid.status_code == 422
    assert invalid.json()["error"]["param"] == "X-Request-Timeout"


def test_a_deadline_in_mid_stream_ends_it_with_status_and_error() -> None:
    model, gate = FakeRewardModel(), Gate()
    model.token_budget = 60
    with serving(model) as server:
        model.on_forward = gate
        gate.open(2)  # of about six steps
        headers = {**LINES, "X-Request-Timeout": "1.5"}
        with httpx.stream("POST", f"{server.url}/best-of-n", json={"prompts": PROMPTS}, headers=headers) as response:
            lines = [json.loads(line) for line in response.iter_lines()]
            request_id = response.headers["x-request-id"]
        model.on_forward = lambda _: None
        gate.open(2)
    assert 1 <= len(lines) - 1 < len(PROMPTS)
    assert lines[-1]["status"] == 504
    assert lines[-1]["error"]["code"] == "deadline_exceeded"
    assert lines[-1]["error"]["request_id"] == request_id


def test_one_unusable_prompt_is_a_line_among_the_others() -> None:
    prompts = [*PROMPTS[:2], {"id": "bad", "prompt": "x" * 100_000, "candidates": ["a", "b"]}, PROMPTS[2]]
    with serving(FakeRewardModel()) as server:
        *outcomes, end = lines_of(httpx.post(f"{server.url}/best-of-n", json={"prompts": prompts}, headers=LINES))
    assert {line["index"] for line in outcomes} == {0, 1, 2, 3}
    assert [line["id"] for line in outcomes if "error" in line] == ["bad"]
    assert end["usage"]["responses"] == 15


def test_a_slow_reader_delays_no_other_request_and_gets_every_line() -> None:
    long = [{**PROMPTS[0], "candidates": [f"Answer {n} " * 40 for n in range(2)]} for _ in range(200)]
    body = json.dumps({"prompts": long, "return_text": True}).encode()
    head = (
        "POST /best-of-n HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/x-ndjson\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with serving(FakeRewardModel(), reward_cache_mib=0) as server, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(30)
        reader.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        reader.sendall(head.encode() + body)
        received = reader.recv(100)
        queue_state = server.service.registry.get("default").queue_state
        deadline = time.monotonic() + 120
        while queue_state().requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert queue_state().requests == 0  # all is computed before the client reads
        assert httpx.post(f"{server.url}/best-of-n", json={"prompts": PROMPTS[:1]}).status_code == 200
        while part := reader.recv(65536):
            received += part
    assert received.count(b'"mean"') == 200
    assert b'"usage"' in received


def test_sigterm_in_mid_stream_finishes_the_stream_before_exit_0(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama")
    arguments = ("--model", checkpoint, "--dtype", "float32", "--token-budget", "64")
    prompts = [
        {
            "id": f"p{number}",
            "prompt": f"{number}?",
            "candidates": [f"{text} {n}" for n in range(20) for text in SENTENCES],
        }
        for number in range(8)
    ]
    with ServerProcess(tmp_path / "log", *arguments) as process:
        process.wait_until_ready()
        with httpx.stream(
            "POST", f"{process.url}/best-of-n", json={"prompts": prompts, "top_k": 1}, headers=LINES, timeout=120
        ) as response:
            incoming = response.iter_lines()
            lines = [json.loads(next(incoming))]
            metrics = httpx.get(f"{process.url}/metrics", timeout=120).text
            assert 'marginrm_queue_requests{model="default"} 1.0' in metrics, (
                "too little work to be ended in its middle"
            )
            process.signal(signal.SIGTERM)
            while "SIGTERM" not in process.log:
                time.sleep(0.01)
            lines += [json.loads(line) for line in incoming]
        assert process.wait(120) == 0
        assert "Traceback" not in process.log
    *outcomes, end = lines
    assert sorted(line["index"] for line in outcomes) == list(range(len(prompts)))
    assert all("ranking" in line for line in outcomes)
    assert end["usage"]["responses"] == sum(len(prompt["candidates"]) for prompt in prompts)


def test_the_openapi_document_describes_every_kind_of_line() -> None:
    document = create_app(Settings()).openapi()
    content = document["paths"]["/best-of-n"]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/BestOfNResponse"}
    check = jsonschema.Draft202012Validator({**content["application/x-ndjson"]["schema"], **document})
    bad = {"id": "bad", "prompt": "x" * 100_000, "candidates": ["a"]}
    model, gate = FakeRewardModel(), Gate()
    model.token_budget = 60
    with serving(model) as server:
        url = f"{server.url}/best-of-n"
        rows = lines_of(httpx.post(url, json={"prompts": [PROMPTS[0], bad]}, headers=LINES))
        model.on_forward = gate
        gate.open(2)
        cut = lines_of(httpx.post(url, json={"prompts": PROMPTS}, headers={**LINES, "X-Request-Timeout": "0.7"}))
        model.on_forward = lambda _: None
        gate.open(2)
    (ranked,) = [row for row in rows if "ranking" in row]
    assert {"error" in row for row in rows[:2]} == {True, False}
    assert cut[-1]["status"] == 504
    for row in rows + cut:
        check.validate(row)
    for wrong in ({}, {"model": rows[2]["model"]}, {"status": 504}, {**ranked, "ranking": "none"}):
        assert not check.is_valid(wrong)
