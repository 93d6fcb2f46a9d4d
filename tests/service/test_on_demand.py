"""`--max-loaded-models`: models beyond the limit are loaded by the requests that name them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from marginrm import RewardModel
from support.models import SENTENCES, tiny_checkpoint
from support.server import serving

PAIR = {"prompt": "Hi?", "chosen": SENTENCES[0], "rejected": SENTENCES[1]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_checkpoint(folder / name, "gpt_neox", seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture
def client(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[httpx.Client]:
    """A server of a, b and a broken c, of which one may be in memory."""
    models = [*(f"{name}={path}" for name, path in checkpoints.items()), f"c={tmp_path}"]
    settings: Any = {"models": models, "dtype": "float32", "max_loaded_models": 1}
    with serving(**settings) as running, httpx.Client(base_url=running.url, timeout=120) as http:
        deadline = time.monotonic() + 120
        while http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield http


def test_a_request_loads_its_model_and_the_least_recently_used_leaves(
    client: httpx.Client, checkpoints: dict[str, Path]
) -> None:
    local = {name: RewardModel.from_pretrained(path, dtype="float32") for name, path in checkpoints.items()}
    for name in "ab":
        reply = client.post("/score", json={"model": name, "pairs": [PAIR]}).json()
        expected = local[name].compare(PAIR["prompt"], PAIR["chosen"], PAIR["rejected"]).margin
        assert reply["pairs"][0]["margin"] == pytest.approx(expected, abs=1e-5)
        assert reply["model"]["name"] == name
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [name]
        assert client.get("/readyz").status_code == 200
    assert client.post("/score", json={"pairs": [PAIR]}).json()["model"]["name"] == "a"  # the first is the default
    unloaded = client.get("/v1/models/b")
    assert (unloaded.status_code, unloaded.json()["error"]["code"]) == (503, "not_ready")
    assert "a scoring request loads it" in unloaded.json()["error"]["message"]


def test_requests_for_several_models_at_once_are_all_answered(client: httpx.Client) -> None:
    names = "abab" * 2

    def ask(name: str) -> str:
        reply = client.post("/score", json={"model": name, "pairs": [PAIR]})
        assert reply.status_code == 200, reply.text
        return reply.json()["model"]["name"]

    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(ask, names)) == list(names)
    ready = [line for line in client.get("/metrics").text.splitlines() if line.startswith("marginrm_ready{")]
    assert len(ready) == 1


def test_a_model_that_cannot_be_loaded_is_refused_and_the_others_are_served(client: httpx.Client) -> None:
    reply = client.post("/score", json={"model": "c", "pairs": [PAIR]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert "config.json" in reply.json()["error"]["message"]
    assert client.post("/score", json={"model": "a", "pairs": [PAIR]}).status_code == 200
    assert client.post("/score", json={"model": "d", "pairs": [PAIR]}).status_code == 404
