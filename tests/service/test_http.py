"""The routes over a real socket, with a fake model that can be held, poisoned and filled up."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from marginrm import ranking
from marginrm.schemas import BestOfNResponse, ScoreResponse
from marginrm_service.telemetry.logs import TextFormatter
from support.server import raw_request, serving
from support.service import FakeRewardModel, Gate

CANARY = "xylophone-canary-4711"


@pytest.fixture(scope="module")
def model():
    return FakeRewardModel()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, max_body_bytes=2_000_000) as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert {"code", "message", "request_id"} <= set(body["error"]) <= {"code", "message", "request_id", "param"}
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return body["error"]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_score_answers_pairs_and_items_in_the_order_of_the_request(client, model):
    pairs = [{"id": f"p{i}", "prompt": f"prompt {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    items = [{"id": "i0", "prompt": [{"role": "user", "content": "hi"}], "response": "there"}]
    response = client.post("/score", json={"pairs": pairs, "items": items, "tie_below": 0.9})
    assert response.status_code == 200
    reply = ScoreResponse.model_validate(response.json())
    assert [pair.id for pair in reply.pairs] == [f"p{i}" for i in range(5)]
    for index, (pair, out) in enumerate(zip(pairs, reply.pairs, strict=True)):
        chosen, rejected = (model.expect(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        assert out.index == index
        assert (out.chosen.reward, out.rejected.reward) == (chosen, rejected)
        expected = ranking.compare(chosen, rejected, 2.0, 0.9)
        assert (out.margin, out.confidence, out.verdict) == (expected.margin, expected.confidence, expected.verdict)
    assert reply.items[0].reward == model.expect("hi", "there")
    assert reply.model == model.info
    assert reply.usage.responses == 11
    assert reply.usage.tokens_computed < reply.usage.tokens
    timed = set(response.headers["server-timing"].replace(";", " ").split()[::2])
    assert timed == {"tokenise", "queue", "forward", "total"}


def test_best_of_n_ranks_candidates_and_lists_unusable_ones(client, model):
    candidates = ["one", "two", "", 7, "three", "four"]
    body = {"prompts": [{"id": "p", "prompt": "count", "candidates": candidates}], "top_k": 2, "return_text": True}
    response = client.post("/best-of-n", json=body)
    assert response.status_code == 200
    (prompt,) = BestOfNResponse.model_validate(response.json()).prompts
    places = [0, 1, 4, 5]
    expected = ranking.rank([model.expect("count", candidates[place]) for place in places], 2.0)
    assert prompt.best == places[expected.best]
    assert (prompt.margin, prompt.confidence) == (expected.margin, expected.confidence)
    assert [entry.candidate for entry in prompt.ranking] == [places[entry.candidate] for entry in expected.ranking[:2]]
    assert [entry.text for entry in prompt.ranking] == [candidates[entry.candidate] for entry in prompt.ranking]
    assert [(error.candidate, error.error.code) for error in prompt.errors] == [(2, "empty_text"), (3, "invalid_text")]


def test_a_bad_item_never_fails_its_neighbours(client, model):
    bad = ["", "   ", None, 5, {"a": 1}, "\ud800", "word " * 600, "x" * 1_000_000]
    items = [{"prompt": "p", "response": text} for text in ["fine", *bad, "good"]]
    # json.dumps keeps the lone surrogate as an escape, as a client's would
    content = json.dumps({"items": items})
    reply = client.post("/score", content=content, headers={"content-type": "application/json"}).json()
    assert reply["items"][0]["reward"] == model.expect("p", "fine")
    assert reply["items"][-1]["reward"] == model.expect("p", "good")
    assert [item["error"]["code"] for item in reply["items"][1:-1]] == [
        "empty_text",
        "empty_text",
        "invalid_text",
        "invalid_text",
        "invalid_text",
        "invalid_text",
        "sequence_too_long",
        "sequence_too_long",
    ]
    assert [item["index"] for item in reply["items"]] == list(range(10))


def test_a_bad_side_of_a_pair_is_named(client):
    pairs = [{"prompt": "p", "chosen": "", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": 5}]
    reply = client.post("/score", json={"pairs": [*pairs, {"prompt": "", "chosen": "c", "rejected": "r"}]}).json()
    assert [(pair["error"]["param"], pair["error"]["code"]) for pair in reply["pairs"]] == [
        ("chosen", "empty_text"),
        ("rejected", "invalid_text"),
        ("prompt", "empty_text"),
    ]
    assert reply["pairs"][0]["error"]["message"] == "chosen is empty."


@pytest.mark.parametrize(
    ("route", "body", "code", "param"),
    [
        ("/score", {"items": [{"prompt": "p", "response": ""}]}, "empty_text", "response"),
        ("/score", {"pairs": [{"prompt": "p", "chosen": "c", "rejected": ""}]}, "empty_text", "rejected"),
        ("/best-of-n", {"prompts": [{"prompt": "", "candidates": ["a", "b"]}]}, "empty_text", "prompt"),
        ("/score", {"items": [{"prompt": "p", "response": "w " * 2000}]}, "sequence_too_long", None),
    ],
)
def test_a_single_unusable_text_is_422(client, route, body, code, param):
    response = client.post(route, json=body)
    assert response.status_code == 422
    error = error_of(response)
    assert (error["code"], error.get("param")) == (code, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"pairs": []}, None),
        ({"pairs": [], "items": []}, None),
        ({"pairs": "no"}, "pairs"),
        ({"pairs": [{"prompt": "p", "chosen": "c"}]}, "pairs[0].rejected"),
        ({"items": [{"prompt": "p", "response": "r"}], "tie_below": 0.2}, "tie_below"),
        ({"items": [{"prompt": "p", "response": "r"}], "truncation": CANARY}, "truncation"),
        ({"items": [{"prompt": "p", "response": "r", "id": 5}]}, "items[0].id"),
        ({"items": [{"prompt": "p", "response": "r"}], "model": ["default"]}, "model"),
        ([], None),
        ("text", None),
    ],
)
def test_a_wrong_shape_is_422_and_names_the_field(client, body, param):
    response = client.post("/score", json=body)
    assert response.status_code == 422
    error = error_of(response)
    assert error["code"] == "invalid_request"
    assert error.get("param") == param
    assert CANARY not in response.text


def test_lone_surrogates_where_names_belong_are_422(client):
    for body in ('{"items": [{"prompt": "p", "response": "r", "id": "\\ud800"}]}', '{"\\ud800": 1}'):
        response = client.post("/score", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 422
        error_of(response)


@pytest.mark.parametrize("body", ["", "{", "[1,", '{"pairs": [}', "\x00", '{"a": NaN', "[" * 100_000])
def test_malformed_json_is_400(client, body):
    response = client.post("/score", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_other_media_types_are_refused_with_the_cure(client):
    response = client.post("/score", data={"a": "b"})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_unknown_models_routes_and_methods(client):
    response = client.post("/score", json={"model": "big", "items": [{"prompt": "p", "response": "r"}]})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unknown_model", "model")
    assert "default" in error["message"]
    assert client.get("/nowhere").status_code == 404
    response = client.get("/score")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_413_with_and_without_its_length(client):
    response = client.post("/score", json={"items": [{"prompt": "p", "response": "x" * 3_000_000}]})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    endless = (b" " * 65_536 for _ in range(40))  # sent in chunks, without a length
    response = client.post("/score", content=endless, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert client.get("/healthz").status_code == 200


def test_a_plain_request_id_is_used(client):
    assert client.get("/healthz", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for bad in ("a b", "x" * 200, 'a"b'):
        assert client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_models_are_listed_with_how_each_computes(client, model):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "default"
    assert card["object"] == "model"
    assert card["forward_path"] == "packed"
    assert card["max_length"] == 512
    assert card["calibrated"] is True
    assert card["temperature"] == 2.0


def test_requests_are_counted_in_the_metrics(model):
    with serving(FakeRewardModel()) as server, httpx.Client(base_url=server.url) as client:
        client.post("/score", json={"items": [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": ""}]})
        client.post("/score", json={"pairs": [{"prompt": "p", "chosen": "c", "rejected": "c"}]})
        client.get("/" + CANARY)
        text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['marginrm_requests_total{method="POST",route="/score",status="200"}'] == "2.0"
    assert lines['marginrm_requests_total{method="GET",route="unmatched",status="404"}'] == "1.0"
    assert lines['marginrm_item_errors_total{code="empty_text",model="default"}'] == "1.0"
    assert lines['marginrm_rewards_bucket{le="+Inf",model="default"}'] == "3.0"
    assert lines['marginrm_confidences_count{model="default"}'] == "1.0"
    assert lines['marginrm_ties_total{model="default"}'] == "1.0"
    assert lines['marginrm_stage_seconds_count{model="default",stage="queue"}'] == "2.0"
    assert lines['marginrm_queue_tokens{model="default"}'] == "0.0"
    assert lines['marginrm_ready{model="default"}'] == "1.0"
    assert CANARY not in text


def test_the_content_of_requests_is_never_logged(server, client, caplog):
    caplog.handler.setFormatter(TextFormatter())
    with caplog.at_level(logging.DEBUG):
        client.post("/score", json={"pairs": [{"id": CANARY, "prompt": CANARY, "chosen": CANARY, "rejected": "r"}]})
        client.post("/score", json={CANARY: CANARY})
        client.post("/score", content="{" + CANARY, headers={"content-type": "application/json"})
        client.post("/score", json={"model": CANARY, "items": [{"prompt": CANARY, "response": CANARY}]})
        client.get(f"/{CANARY}?{CANARY}", headers={"x-request-id": f"<{CANARY}>", "authorization": CANARY})
        raw_request(server.url, f"GARBAGE {CANARY}\r\n\r\n".encode())
    assert caplog.text.count("request") >= 5
    # The client's own lines, and uvicorn's access log, which is off but which pytest turns on.
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "uvicorn.access"))]
    assert not [record for record in ours if CANARY in caplog.handler.format(record)]


@pytest.mark.parametrize("kind", ["poisoned", "nan_token"])
def test_a_fault_in_the_forward_pass_is_an_item_error_beside_good_rewards(kind):
    model = FakeRewardModel()
    setattr(model, kind, model.token_of("~"))
    code = {"poisoned": "forward_failed", "nan_token": "non_finite_reward"}[kind]
    with serving(model) as server, httpx.Client(base_url=server.url) as client:
        items = [{"prompt": "p", "response": text} for text in ("a", "~", "b")]
        reply = client.post("/score", json={"items": items}).json()
        assert [item.get("reward") for item in reply["items"]] == [model.expect("p", "a"), None, model.expect("p", "b")]
        assert reply["items"][1]["error"]["code"] == code
        response = client.post("/score", json={"items": items[1:2]})
        assert response.status_code == 500
        assert error_of(response)["code"] == code
        assert client.get("/readyz").status_code == 200


def test_a_full_queue_is_429_with_retry_after_and_the_accepted_are_answered():
    gate = Gate()
    model = FakeRewardModel()
    with serving(model, max_queue_requests=3) as server, ThreadPoolExecutor(8) as threads:
        model.on_forward = gate
        body = {"items": [{"prompt": "p", "response": "r"}]}
        accepted = [threads.submit(httpx.post, f"{server.url}/score", json=body, timeout=120) for _ in range(3)]
        queue_state = server.service.registry.get("default").queue_state
        wait_for(lambda: queue_state().requests == 3)
        response = httpx.post(f"{server.url}/score", json=body)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "overloaded"
        gate.open(3)
        assert [call.result().status_code for call in accepted] == [200] * 3
        assert (queue_state().tokens, queue_state().requests) == (0, 0)
        assert (
            'marginrm_rejections_total{model="default",reason="overloaded"} 1.0'
            in httpx.get(f"{server.url}/metrics").text
        )


def test_a_request_larger_than_the_queue_is_413():
    with serving(FakeRewardModel(), max_queue_tokens=100) as server:
        items = [{"prompt": "p", "response": f"{number} " + "word " * 20} for number in range(10)]
        response = httpx.post(f"{server.url}/score", json={"items": items})
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"


def test_a_disconnect_cancels_the_request():
    gate = Gate()
    model = FakeRewardModel()
    with serving(model, reward_cache_mib=0) as server:
        model.on_forward = gate
        model.steps.clear()
        body = {"items": [{"prompt": "p", "response": "first"}]}
        first = threading.Thread(target=httpx.post, args=(f"{server.url}/score",), kwargs={"json": body, "timeout": 30})
        first.start()
        assert gate.entered.acquire(timeout=120)
        queue_state = server.service.registry.get("default").queue_state
        content = json.dumps({"items": [{"prompt": "p", "response": "gone"}]}).encode()
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        raw_request(server.url, head % len(content) + content, read=False)
        wait_for(lambda: 'status="499"' in httpx.get(f"{server.url}/metrics").text)
        assert queue_state().requests == 1
        gate.open(5)
        first.join(30)
        assert httpx.post(f"{server.url}/score", json=body).status_code == 200
        scored = [response.ids for step in model.steps for members in step for response in members]
        assert scored == [model.encoder.encode("p", "first").ids] * 2


def test_while_loading_and_draining_replies_have_retry_after():
    with serving(models="slow=/nonexistent/never-loaded") as server, httpx.Client(base_url=server.url) as client:
        response = client.post("/score", json={"model": "slow", "items": [{"prompt": "p", "response": "r"}]})
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert client.get("/healthz").status_code == 200
        wait_for(lambda: server.service.registry.failure is not None)
        response = client.get("/readyz")
        assert response.status_code == 503
        assert "Loading failed" in error_of(response)["message"]
    with serving(FakeRewardModel()) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/readyz").status_code == 200
        server.service.draining = True
        response = client.get("/readyz")
        assert response.status_code == 503
        assert error_of(response)["code"] == "draining"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_turns_readiness_off():
    class Fatal(BaseException):
        pass

    def die(groups):
        raise Fatal

    model = FakeRewardModel()
    with serving(model) as server, httpx.Client(base_url=server.url) as client:
        model.on_forward = die
        for _ in range(2):
            response = client.post("/score", json={"items": [{"prompt": "p", "response": "r"}]})
            assert response.status_code == 503
            assert error_of(response)["code"] == "engine_stopped"
        assert client.get("/readyz").status_code == 503
        assert 'marginrm_ready{model="default"} 0.0' in client.get("/metrics").text


def test_an_unexpected_exception_is_500_without_details(caplog):
    model = FakeRewardModel()
    with serving(model) as server, httpx.Client(base_url=server.url) as client:
        model.encoder.encode_group = lambda *_: None  # a bug
        response = client.post("/score", json={"items": [{"prompt": CANARY, "response": "r"}]})
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"
        assert "Error:" not in response.text
        assert client.get("/healthz").status_code == 200
    assert "failed unexpectedly" in caplog.text


def test_models_by_name(model):
    other = FakeRewardModel("other", temperature=5.0)
    with serving(other, FakeRewardModel("third")) as server, httpx.Client(base_url=server.url) as client:
        items = [{"prompt": "p", "response": "r"}]
        asked = [client.post("/score", json={"model": name, "items": items}).json() for name in ("third", "default")]
        assert [reply["model"]["name"] for reply in asked] == ["third", "other"], "the first one is the default"
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["other", "third"]


def test_the_api_describes_itself_with_examples_that_work(client):
    document = client.get("/openapi.json").json()
    assert {"/score", "/best-of-n", "/healthz", "/readyz", "/v1/models", "/metrics"} <= set(document["paths"])
    for route, name in (("/score", "ScoreRequest"), ("/best-of-n", "BestOfNRequest")):
        for example in document["components"]["schemas"][name]["examples"]:
            assert client.post(route, json=example).status_code == 200
