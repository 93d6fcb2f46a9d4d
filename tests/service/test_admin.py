"""Loading, swapping and unloading models while the server runs."""

from __future__ import annotations

import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from marginrm_service.keys import add_key
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import serving
from support.service import FakeRewardModel, Gate

ASK = {"items": [{"prompt": "Hi?", "response": "Yes."}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_models_are_loaded_swapped_and_unloaded_at_run_time(tmp_path: Path) -> None:
    admin = add_key(tmp_path / "admin", "root")
    first, second = (
        tiny_checkpoint(tmp_path / name, "llama", chat_template=CHATML_TEMPLATE, seed=seed)
        for name, seed in (("one", 0), ("two", 1))
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    with (
        serving(FakeRewardModel(), admin_key_file=tmp_path / "admin", dtype="float32") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):

        def load(path: Path, key: str = admin) -> httpx.Response:
            return http.post("/admin/models", json={"name": "m", "path": str(path)}, headers=bearer(key))

        def ask() -> tuple[str, float]:
            body = http.post("/score", json={"model": "m", **ASK}).raise_for_status().json()
            return body["model"]["revision"], body["items"][0]["reward"]

        assert load(first, "wrong").status_code == 401
        assert http.post("/score", json={"model": "m", **ASK}).status_code == 404
        assert load(first).json()["id"] == "m"
        before = ask()
        refused = load(broken)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "path")
        assert ask() == before  # a checkpoint that cannot be served changes nothing
        load(second).raise_for_status()
        after = ask()
        assert after[0] != before[0]
        assert after[1] != pytest.approx(before[1])
        assert http.delete("/admin/models/m", headers=bearer(admin)).status_code == 204
        assert http.post("/score", json={"model": "m", **ASK}).status_code == 404
        last = http.delete("/admin/models/default", headers=bearer(admin))
        assert (last.status_code, last.json()["error"]["code"]) == (409, "last_model")
        assert http.get("/readyz").status_code == 200


def test_gauges_of_an_unloaded_model_are_gone() -> None:
    gauges = ("queue_tokens", "queue_requests", "reward_cache_bytes", "prefix_cache_bytes", "ready")
    with serving(FakeRewardModel(), FakeRewardModel("m")) as server, httpx.Client(base_url=server.url) as http:

        def shown() -> dict[str, bool]:
            text = http.get("/metrics").text
            return {gauge: f'marginrm_{gauge}{{model="m"}}' in text for gauge in gauges} | {
                "model": bool(re.search(r'marginrm_model\{.*model="m"', text))
            }

        assert set(shown().values()) == {True}
        server.on_loop(server.service.registry.unload("m"))
        assert shown() == dict.fromkeys(shown(), False)


def test_a_replaced_model_is_freed() -> None:
    model = FakeRewardModel()
    left = weakref.ref(model)
    model.circle = model  # as real ones are
    with serving() as server:
        server.on_loop(server.service.registry.add(model))
        del model
        server.on_loop(server.service.registry.add(FakeRewardModel()))
        for _ in range(1000):
            if left() is None:
                return
            time.sleep(0.01)
    raise AssertionError("the old model is still in memory")


def test_the_old_model_answers_requests_that_it_accepted_before_a_swap() -> None:
    gate = Gate()
    old, new = FakeRewardModel(), FakeRewardModel(temperature=7.0)
    with (
        serving(old) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
        ThreadPoolExecutor() as pool,
    ):
        old.on_forward = gate
        waiting = [pool.submit(http.post, "/score", json=ASK) for _ in range(8)]
        assert gate.entered.acquire(timeout=120)
        server.on_loop(server.service.registry.add(new))
        assert http.post("/score", json=ASK).json()["model"]["temperature"] == 7.0
        old.on_forward = lambda _: None
        gate.open()
        answers = [future.result(30) for future in waiting]
        assert {answer.status_code for answer in answers} == {200}
        assert old.info.temperature in {answer.json()["model"]["temperature"] for answer in answers}


def test_a_lease_keeps_the_old_model_in_service_while_its_request_is_tokenised() -> None:
    old, new = FakeRewardModel(), FakeRewardModel(temperature=7.0)
    encode_group, tokenising, swapped = old.encoder.encode_group, threading.Event(), threading.Event()

    def slow(*arguments: object) -> object:
        tokenising.set()
        assert swapped.wait(120)
        return encode_group(*arguments)

    with serving(old) as server, ThreadPoolExecutor() as pool:
        old.encoder.encode_group = slow
        waiting = pool.submit(httpx.post, f"{server.url}/score", json=ASK, timeout=120)
        assert tokenising.wait(120)
        before = server.service.registry.get("default")
        server.on_loop(server.service.registry.add(new))
        time.sleep(0.2)  # the old model has nothing in its queue, and would end now without a lease
        assert before.engine.alive
        swapped.set()
        answer = waiting.result(30)
        assert (answer.status_code, answer.json()["model"]["temperature"]) == (200, 2.0)
        deadline = time.monotonic() + 120
        while before.engine.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
