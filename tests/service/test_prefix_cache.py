"""The prefix cache over HTTP: what trainers and chats send again is computed once, and no key's prefixes reach another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from marginrm import RewardModel
from marginrm_service.engine.job import GroupPlan, Job
from marginrm_service.engine.queue import FairQueue
from marginrm_service.keys import add_key
from support.forward import load, one_by_one
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import AppServer, serving
from support.service import group

PROMPTS = [f"{number}. Describe the sea, the sky and the dough, please. " * 9 for number in range(3)]
SAMPLES = 5
BLOCK = 16  # tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    return tiny_checkpoint(folder, "qwen3", kv_heads=2, chat_template=CHATML_TEMPLATE, max_length=2048)


@pytest.fixture
def server(checkpoint: Path) -> Iterator[AppServer]:
    with serving(loaded(checkpoint), reward_cache_mib=0) as running:
        yield running


def loaded(checkpoint: Path) -> RewardModel:
    return RewardModel.from_pretrained(checkpoint, dtype="float32", token_budget=512, prefix_cache_mib=16)


def sample(prompt: str, number: int) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\nSample {number}: grey, mostly.<|im_end|>\n"


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"marginrm_{name}{{")))


def card(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/v1/models").json()["data"][0]
    return found


def test_samples_in_requests_of_their_own_compute_each_prompt_once(server: AppServer, checkpoint: Path) -> None:
    encoder = loaded(checkpoint).encoder
    texts = [sample(prompt, number) for number in range(SAMPLES) for prompt in PROMPTS]  # round robin
    ids = {text: encoder.encode_text(text) for text in texts}
    prompts = sum(len(encoder.encode_text(f"<|im_start|>user\n{prompt}<|im_end|>\n").ids) for prompt in PROMPTS)
    with httpx.Client(base_url=server.url, timeout=120) as http:
        before = metric(http, "tokens_computed_total")

        def classify(text: str) -> float:
            reply = http.post("/classify", json={"model": "rm", "input": text, "use_activation": False})
            reward: float = reply.raise_for_status().json()["data"][-1]["probs"][-1]
            return reward

        first = [classify(text) for text in texts[: len(PROMPTS)]]
        with ThreadPoolExecutor(4) as clients:
            rewards = [*first, *clients.map(classify, texts[len(PROMPTS) :])]
        computed = metric(http, "tokens_computed_total") - before
        own = sum(len(one.ids) for one in ids.values()) - SAMPLES * prompts
        assert computed <= prompts + own + len(texts) * BLOCK
        assert metric(http, "prefix_cache_hits_total") == len(texts) - len(PROMPTS)
        assert metric(http, "prefix_cache_tokens_total") >= (SAMPLES - 1) * (prompts - len(PROMPTS) * BLOCK)
        kept = card(http)["prefix_cache"]
        assert kept["hits"] == len(texts) - len(PROMPTS)
        assert 0 < kept["bytes"] <= kept["max_bytes"] == 16 * 2**20
        assert metric(http, "prefix_cache_bytes") == kept["bytes"]
    with torch.no_grad():
        expected = one_by_one(load(checkpoint), [[ids[text]] for text in texts])
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=1e-5)


def test_a_chat_scored_after_each_of_eight_turns_computes_each_token_about_once(server: AppServer) -> None:
    messages: list[dict[str, str]] = []
    asked = []
    with httpx.Client(base_url=server.url, timeout=120) as http:
        for turn in range(8):
            messages.append({"role": "user", "content": f"Turn {turn}: how does bread rise, and how long?"})
            answer = f"It rests for {turn} hours, before it goes into a hot oven."
            item = {"prompt": list(messages), "response": answer}
            asked.append(http.post("/score", json={"items": [item]}).raise_for_status().json()["usage"])
            messages.append({"role": "assistant", "content": answer})
    assert sum(usage["tokens_computed"] for usage in asked) <= asked[-1]["tokens"] + 8 * BLOCK


def computed(http: httpx.Client, key: str, text: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    reply = http.post("/score", json={"items": [{"prompt": PROMPTS[0], "response": text}]}, headers=headers)
    count: int = reply.raise_for_status().json()["usage"]["tokens_computed"]
    return count


@pytest.mark.parametrize("shared", [False, True])
def test_keys_share_prefixes_only_where_that_is_allowed(checkpoint: Path, tmp_path: Path, shared: bool) -> None:
    keys = tmp_path / "keys"
    ada, bob = add_key(keys, "ada"), add_key(keys, "bob")
    settings = {"key_file": keys, "prefix_cache_shared": shared, "reward_cache_mib": 0}
    with serving(loaded(checkpoint), **settings) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        whole = computed(http, ada, "Grey.")
        assert computed(http, ada, "Blue.") < whole / 2
        assert (computed(http, bob, "Blue.") < whole / 2) == shared
        assert computed(http, bob, "Grey.") < whole / 2


def test_a_model_that_is_loaded_again_begins_with_an_empty_cache(checkpoint: Path, tmp_path: Path) -> None:
    admin = tmp_path / "admin"
    key = {"Authorization": f"Bearer {add_key(admin, 'root')}"}
    other = tiny_checkpoint(tmp_path / "other", "qwen3", kv_heads=2, chat_template=CHATML_TEMPLATE, seed=1)
    settings = {"admin_key_file": admin, "dtype": "float32", "prefix_cache_mib": 16, "token_budget": 512}
    with (
        serving(loaded(checkpoint), reward_cache_mib=0, **settings) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        whole = computed(http, "none", "Grey.")
        assert computed(http, "none", "Blue.") < whole / 2
        http.post("/admin/models", json={"name": "default", "path": str(other)}, headers=key).raise_for_status()
        assert card(http)["prefix_cache"]["hits"] == 0
        assert computed(http, "none", "Blue.") == whole


def test_without_a_cache_nothing_is_kept_and_the_card_says_so(checkpoint: Path) -> None:
    model = RewardModel.from_pretrained(checkpoint, dtype="float32", token_budget=512)
    with serving(model, reward_cache_mib=0) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        assert computed(http, "none", "Grey.") == computed(http, "none", "Blue.")
        assert card(http)["prefix_cache"] is None


def test_the_queue_counts_only_what_is_not_cached() -> None:
    cached = {0: 0}
    queue = FairQueue(100, lambda ids, _: min(cached[0], len(ids)))
    jobs = [Job.of([group([7] * 90 + [number] * 10)], share_prefix=True, tenant="") for number in range(1, 12)]
    for job in jobs:
        queue.push(job)
    assert [job for job, _ in queue.take()] == jobs[:1]
    cached[0] = 80
    assert [job for job, _ in queue.take()] == jobs[1:6]  # 20 tokens each


def test_a_group_over_the_budget_costs_its_own_tokens_behind_a_cached_prompt() -> None:
    plan = GroupPlan([60, 70], 50, reusable=50)
    assert (plan.cost, plan.prompt) == (80, 50)
    plan.cached = 48
    assert (plan.cost, plan.prompt) == (32, 2)
    lone = GroupPlan([60], 0, reusable=59, cached=48)
    assert (lone.cost, lone.prompt) == (12, 0)
