"""`marginrm serve` as users run it: a process, a checkpoint, signals, and rewards equal to the library's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from marginrm import RewardModel
from marginrm.manifest import EncodingInfo, GoldenSample, Manifest
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint
from support.server import ServerProcess

CANARY = "xylophone-canary-4711"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A plain Hugging Face checkpoint, without a manifest."""
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3", chat_template=CHATML_TEMPLATE, kv_heads=2)


@pytest.fixture(scope="module")
def encoder_checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="module")
def server(checkpoint, encoder_checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ("--model", checkpoint, "--model", f"bert={encoder_checkpoint}", "--dtype", "float32")
    arguments += ("--reward-cache-mib", "0")  # each reward is to come from the model
    with ServerProcess(log, *arguments, "--log-format", "json", "--log-level", "debug") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="module")
def local(checkpoint):
    return RewardModel.from_pretrained(checkpoint, dtype="float32")


def texts(seed: int) -> tuple[str, list[str]]:
    rng = random.Random(seed)
    pick = lambda least, most: " ".join(rng.choices(SENTENCES, k=rng.randint(least, most)))  # noqa: E731
    return pick(1, 4), [f"{pick(1, 3)} {number}" for number in range(rng.randint(2, 6))]


def test_a_plain_checkpoint_is_served_uncalibrated(server):
    with httpx.Client(base_url=server.url) as client:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert list(cards) == ["default", "bert"]
        assert [(card["calibrated"], card["temperature"]) for card in cards.values()] == [(False, 1.0)] * 2
        assert cards["default"]["dtype"] == "float32"
        assert cards["default"]["forward_path"] == "packed"
        assert cards["default"]["revision"].startswith("sha256:")


def test_the_same_pair_alone_and_among_two_hundred_others(server, local):
    prompt, (chosen, rejected, *_) = texts(0)
    pair = {"pairs": [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]}
    expected = local.score(prompt, [chosen, rejected])

    async def others(client: httpx.AsyncClient, seed: int) -> None:
        question, candidates = texts(seed)
        body = {"prompts": [{"prompt": question, "candidates": candidates}]}
        response = await client.post("/best-of-n", json=body)
        ranking = response.json()["prompts"][0]["ranking"]
        rewards = [entry["reward"] for entry in sorted(ranking, key=lambda entry: entry["candidate"])]
        assert rewards == pytest.approx(local.score(question, candidates), abs=TOLERANCE)

    async def scenario() -> list[list[float]]:
        limits = httpx.Limits(max_connections=250)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            replies = [await client.post("/score", json=pair)]
            async with asyncio.TaskGroup() as tasks:
                crowd = [tasks.create_task(others(client, seed)) for seed in range(1, 101)]
                ours = [tasks.create_task(client.post("/score", json=pair)) for _ in range(5)]
                crowd += [tasks.create_task(others(client, seed)) for seed in range(101, 201)]
            assert len(crowd) == 200
            replies += [task.result() for task in ours]
        return [[reply.json()["pairs"][0][side]["reward"] for side in ("chosen", "rejected")] for reply in replies]

    for rewards in asyncio.run(scenario()):
        assert rewards == pytest.approx(expected, abs=TOLERANCE)


def test_an_encoder_is_served_beside_a_decoder(server, encoder_checkpoint):
    prompt, responses = texts(7)
    body = {"model": "bert", "items": [{"prompt": prompt, "response": response} for response in responses]}
    reply = httpx.post(f"{server.url}/score", json=body, timeout=120).json()
    expected = RewardModel.from_pretrained(encoder_checkpoint, dtype="float32").score(prompt, responses)
    assert [item["reward"] for item in reply["items"]] == pytest.approx(expected, abs=TOLERANCE)
    assert reply["model"]["name"] == "bert"


def test_a_ten_megabyte_prompt_is_refused_quickly_and_its_neighbours_are_scored(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        huge = "All work and no play. " * 500_000
        started = time.perf_counter()
        response = client.post("/score", json={"items": [{"prompt": huge, "response": "r"}]})
        assert time.perf_counter() - started < 5
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "sequence_too_long"
        items = [{"prompt": "p", "response": "good"}, {"prompt": huge, "response": "r"}]
        reply = client.post("/score", json={"items": items, "truncation": "prompt_left"}).json()
        assert "reward" in reply["items"][0]
        assert reply["items"][1]["error"]["code"] == "sequence_too_long"
        assert client.post("/score", content=b"x" * 40_000_000).status_code == 413


def test_a_long_prompt_is_cut_only_on_request(server, local):
    prompt = " ".join(SENTENCES * 8)
    items = {"items": [{"prompt": prompt, "response": "Paris."}, {"prompt": "Where?", "response": "Paris."}]}
    refused, fine = httpx.post(f"{server.url}/score", json=items).json()["items"]
    assert refused["error"]["code"] == "sequence_too_long"
    assert fine["truncated"] is False
    cut, _ = httpx.post(f"{server.url}/score", json={**items, "truncation": "prompt_left"}).json()["items"]
    assert cut["truncated"] is True
    assert cut["tokens"] == local.encoder.max_length
    assert cut["reward"] == pytest.approx(local.score(prompt, ["Paris."], "prompt_left")[0], abs=TOLERANCE)


def test_the_pages_load_nothing_from_other_servers(server):
    with httpx.Client(base_url=server.url) as client:
        for path in ("/", "/docs"):
            page = client.get(path)
            assert page.status_code == 200
            assert "default-src 'self'" in page.headers["content-security-policy"]
            assert "http://" not in page.text
            assert "https://" not in page.text
            parts = [part.split('"')[0] for part in page.text.replace('href="', 'src="').split('src="')[1:]]
            for part in parts:
                assert client.get(part).status_code == 200, part
        assert client.get("/page/..%2Fapp.py").status_code == 404


def test_the_json_log_holds_no_text_of_a_client(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for body in (
            {"pairs": [{"id": CANARY, "prompt": CANARY, "chosen": CANARY, "rejected": f"{CANARY} \ud800"}]},
            {"items": [{"prompt": [{"role": CANARY, "content": CANARY}], "response": CANARY}]},
            {"items": [{"prompt": CANARY * 10_000, "response": CANARY}]},
            {CANARY: CANARY},
        ):
            headers = {"content-type": "application/json"}
            client.post("/score", content=json.dumps(body), headers=headers)
        client.post("/best-of-n", content="{" + CANARY)
        client.get(f"/{CANARY}?{CANARY}", headers={"x-request-id": f"<{CANARY}>", "authorization": CANARY})
    assert CANARY not in server.log
    events = [json.loads(line) for line in server.log.splitlines()]
    assert [event["request_id"] for event in events if event["message"] == "request"]


def test_sigterm_finishes_accepted_requests_and_exits_with_0(checkpoint, tmp_path):
    arguments = ("--model", checkpoint, "--dtype", "float32", "--token-budget", "300", "--reward-cache-mib", "0")
    with ServerProcess(tmp_path / "log", *arguments) as process:
        process.wait_until_ready()
        prompt = " ".join(SENTENCES)
        body = {"prompts": [{"prompt": prompt, "candidates": [f"{s} {i}" for i in range(10) for s in SENTENCES]}]}

        async def scenario() -> list[int]:
            async with httpx.AsyncClient(base_url=process.url, timeout=120) as client:
                calls = [asyncio.create_task(client.post("/best-of-n", json=body)) for _ in range(8)]
                text = ""
                while 'marginrm_queue_requests{model="default"} 8.0' not in text:
                    text = (await client.get("/metrics")).text
                    assert not any(call.done() for call in calls), "too fast to be caught waiting"
                process.signal(signal.SIGTERM)
                return [response.status_code for response in await asyncio.gather(*calls)]

        assert asyncio.run(scenario()) == [200] * 8
        assert process.wait() == 0
        assert "SIGTERM: finishing" in process.log


def test_a_request_on_an_open_connection_during_the_shutdown_is_answered(checkpoint, tmp_path):
    with ServerProcess(tmp_path / "log", "--model", checkpoint, "--dtype", "float32") as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.url, timeout=120) as client:
            assert client.get("/healthz").headers.get("connection") != "close"
            process.signal(signal.SIGTERM)
            while "SIGTERM: finishing" not in process.log:
                time.sleep(0.005)
            time.sleep(0.15)  # uvicorn looks at its flag every 0.1 s and then closed what was idle
            reply = client.post("/score", json={"items": [{"prompt": "p", "response": "r"}]})
            assert reply.status_code == 200
            assert reply.headers["connection"] == "close"
        assert process.wait() == 0


def test_a_second_signal_ends_the_process_at_once(checkpoint, tmp_path):
    arguments = ("--model", checkpoint, "--dtype", "float32", "--token-budget", "64")
    with ServerProcess(tmp_path / "log", *arguments) as process:
        process.wait_until_ready()
        body = {"prompts": [{"prompt": "p", "candidates": [f"{SENTENCES[0]} {i}" for i in range(20_000)]}]}
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(httpx.post, f"{process.url}/best-of-n", json=body, timeout=120)
            while (
                'marginrm_queue_requests{model="default"} 1.0'
                not in httpx.get(f"{process.url}/metrics", timeout=120).text
            ):
                time.sleep(0.05)
            process.signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.process.poll() is None, "it should be busy with what it accepted"
            process.signal(signal.SIGTERM)
            assert process.wait(120) == 1
            assert call.result().status_code == 503
            assert call.result().json()["error"]["code"] == "draining"
            assert "Traceback" not in process.log


ENDLESS_LOADING = """
import logging, torch
from marginrm_service.models import loading

def load_model(spec, settings):
    logging.getLogger("marginrm_service").info("computing")
    matrix = torch.rand(512, 512)
    while True:
        matrix = torch.mm(matrix, matrix).clamp(0, 1)

loading.load_model = load_model
"""


def test_sigterm_while_a_model_is_loading_exits_with_0(checkpoint, tmp_path):
    # Python's own end kills threads that come back from torch to it, and C++ then aborts the process.
    with ServerProcess(tmp_path / "log", "--model", checkpoint, before=ENDLESS_LOADING) as process:
        while "computing" not in process.log:
            assert process.process.poll() is None, process.log
            time.sleep(0.05)
        process.signal(signal.SIGTERM)
        assert process.wait(120) == 0, process.log


def golden_manifest(checkpoint, reward_error: float = 0.0) -> Manifest:
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    sample = model.encoder.encode("Why?", "Because.")
    (reward,) = model.score("Why?", ["Because."])
    return Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny",
        encoding=EncodingInfo.model_validate(model.encoder.describe().model_dump()),
        golden=[GoldenSample(prompt="Why?", response="Because.", ids=list(sample.ids), reward=reward + reward_error)],
        golden_tolerance={"float32": 1e-4},
    )


def broken(checkpoint, fault: str):
    if fault == "golden":
        golden_manifest(checkpoint, reward_error=0.5).save(checkpoint)
    elif fault == "tokenizer":
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
    elif fault == "weights":
        (checkpoint / "model.safetensors").unlink()
    elif fault == "half":
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    return checkpoint


def test_a_checkpoint_that_cannot_be_served_ends_the_process_with_the_reason(tmp_path):
    messages = {
        "golden": "golden[0]: reward",
        "tokenizer": "tokenizer",
        "weights": "safetensors",
        "half": "Cannot load the weights",
    }
    with contextlib.ExitStack() as stack:
        processes = {}
        for fault in messages:
            checkpoint = broken(tiny_checkpoint(tmp_path / fault, "llama"), fault)
            process = ServerProcess(tmp_path / f"{fault}.log", "--model", checkpoint, "--dtype", "float32")
            processes[fault] = stack.enter_context(process)
        for fault, process in processes.items():
            assert process.wait(120) == 1
            last = process.log.strip().splitlines()[-1]
            assert last.startswith("marginrm: error: ")
            assert messages[fault] in last
            assert "model 'default'" in last


def test_wrong_usage_is_reported_before_loading(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, env, message in (
            (("--model", checkpoint, "--port", port), {}, "Another process listens there"),
            ((checkpoint, "--port", port), {"MARGINRM_MODELS": "a,b"}, "Another process listens there"),
            ((), {}, "No model to serve"),
            (("--model", "a", "--model", "b"), {}, "NAME=PATH"),
            (("a", "--model", "b"), {}, "NAME=PATH"),
            (("--model", checkpoint), {"MARGINRM_MAX_BODY_BYTES": "many"}, "max_body_bytes"),
        ):
            with ServerProcess(tmp_path / "log", *arguments, env=env) as process:
                assert process.wait() == 1
                assert message in process.log
                assert "Traceback" not in process.log
                assert "Loading" not in process.log
