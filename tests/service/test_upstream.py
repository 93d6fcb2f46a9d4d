"""Models whose forward pass another server runs: equal rewards, our own margins and keys, and faults of that server.

The server of most tests is scripted (`support.upstream`). `test_upstream_vllm.py` has a real vLLM.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from marginrm.errors import ConfigError, GoldenMismatchError, ModelError
from marginrm.loading import load_encoder
from marginrm.manifest import Calibration, EncodingInfo, GoldenSample, Manifest
from marginrm_service.errors import UpstreamUnavailableError
from marginrm_service.keys import add_key
from marginrm_service.settings import ModelSpec, Settings
from marginrm_service.upstream.model import UpstreamModel
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import AppServer, serving
from support.upstream import Upstream, rewards_by_transformers

PROMPT = "Why does bread rise?"
RESPONSES = [f"Yeast eats sugar, {number} times." for number in range(5)]
T = 1.7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("upstream") / "model", "qwen3", chat_template=CHATML_TEMPLATE, kv_heads=2
    )


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[float]:
    return rewards_by_transformers(checkpoint, PROMPT, RESPONSES)


@pytest.fixture
def upstream(checkpoint) -> Iterator[Upstream]:
    server = Upstream(checkpoint).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def described(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with a calibration and golden samples, and without its weights."""
    folder = tmp_path_factory.mktemp("described") / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    manifest_of(checkpoint).save(folder)
    return folder


def manifest_of(checkpoint: Path, reward_error: float = 0.0) -> Manifest:
    """A manifest whose golden reward is transformers' own."""
    encoder = load_encoder(checkpoint, most_tokens=512)
    (reward,) = rewards_by_transformers(checkpoint, PROMPT, RESPONSES[:1])
    ids = list(encoder.encode(PROMPT, RESPONSES[0]).ids)
    zeros = dict.fromkeys(("ece_before", "ece_after", "brier_before", "brier_after", "nll_before", "nll_after"), 0.0)
    return Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny",
        encoding=EncodingInfo.model_validate(encoder.describe().model_dump()),
        calibration=Calibration(temperature=T, n=100, **zeros),
        golden=[GoldenSample(prompt=PROMPT, response=RESPONSES[0], ids=ids, reward=reward + reward_error)],
        golden_tolerance={"float32": 1e-4},
    )


def settings_for(folder: Path, upstream: Upstream, **more: Any) -> dict[str, Any]:
    return {
        "models": str(folder),
        "upstreams": f"vllm={upstream.url}",
        "dtype": "float32",
        "reward_cache_mib": 0,
        "token_budget": 600,
        **more,
    }


def client(server: AppServer, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, **options)


def wait_for(http: httpx.Client, status: int, words: str = "") -> str:
    """Waits until `/readyz` answers so, and returns its body."""
    deadline = time.monotonic() + 60
    while True:
        reply = http.get("/readyz")
        if reply.status_code == status and words in reply.text:
            return reply.text
        assert time.monotonic() < deadline, reply.text
        time.sleep(0.02)


def rewards(http: httpx.Client) -> list[float]:
    items = [{"prompt": PROMPT, "response": response} for response in RESPONSES]
    reply = http.post("/score", json={"items": items}).raise_for_status()
    return [item["reward"] for item in reply.json()["items"]]


@pytest.fixture
def load(upstream) -> Iterator[Callable[..., UpstreamModel]]:
    """Loads a model that has the upstream."""
    loaded: list[UpstreamModel] = []

    def of(folder: Path, **more: Any) -> UpstreamModel:
        settings = Settings(**settings_for(folder, upstream, **more))
        spec, server = ModelSpec("default", str(folder)), settings.upstream_of("default")
        loaded.append(UpstreamModel.load(spec, server, settings))
        return loaded[-1]

    yield of
    for model in loaded:
        model.close()


def test_rewards_are_those_of_transformers_and_confidence_is_ours(described, upstream, expected):
    with serving(**settings_for(described, upstream)) as server, client(server) as http:
        wait_for(http, 200)
        assert rewards(http) == pytest.approx(expected, abs=1e-4)
        pair = {"prompt": PROMPT, "chosen": RESPONSES[0], "rejected": RESPONSES[1]}
        found = http.post("/score", json={"pairs": [pair]}).json()
        (compared,), margin = found["pairs"], expected[0] - expected[1]
        assert compared["margin"] == pytest.approx(margin, abs=1e-4)
        assert compared["confidence"] == pytest.approx(1 / (1 + 2.718281828459045 ** (-margin / T)), abs=1e-4)
        ranked = http.post("/best-of-n", json={"prompts": [{"prompt": PROMPT, "candidates": RESPONSES}]}).json()
        assert ranked["prompts"][0]["best"] == max(range(len(expected)), key=expected.__getitem__)
        (card,) = http.get("/v1/models").json()["data"]
        assert (card["forward_path"], card["dtype"], card["temperature"]) == ("upstream", "float32", T)
        assert http.get("/v1/models/default").json()["golden"]["difference"] <= 1e-4
    sent = [body for body, _ in upstream.bodies]
    assert {body["use_activation"] for body in sent} == {False}
    assert {body["model"] for body in sent} == {"rm"}


def test_its_death_is_a_503_and_its_return_needs_no_restart(described, upstream, expected):
    with serving(**settings_for(described, upstream)) as server, client(server) as http:
        wait_for(http, 200)
        upstream.stop()
        try:
            reply = http.post("/score", json={"items": [{"prompt": PROMPT, "response": RESPONSES[0]}]})
            assert reply.status_code == 503
            assert int(reply.headers["Retry-After"]) >= 1
            assert reply.json()["error"]["code"] == "upstream_unavailable"
            assert "cannot be reached" in wait_for(http, 503)
            assert http.get("/healthz").status_code == 200  # a new process would not help
            assert 'marginrm_ready{model="default"} 0.0' in http.get("/metrics").text
            refused = 'marginrm_rejections_total{model="default",reason="upstream_unavailable"} 1.0'
            assert refused in http.get("/metrics").text
        finally:
            upstream.start()
        wait_for(http, 200)
        assert rewards(http) == pytest.approx(expected, abs=1e-4)


def test_another_model_in_its_place_is_not_used(checkpoint, upstream, expected, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", "qwen3", chat_template=CHATML_TEMPLATE, kv_heads=2, seed=1)
    with serving(**settings_for(checkpoint, upstream)) as server, client(server) as http:
        wait_for(http, 200)
        upstream.stop()
        wait_for(http, 503)
        upstream.load(other)
        upstream.start()
        assert "other rewards" in wait_for(http, 503, "other rewards")
        assert http.post("/score", json={"items": [{"prompt": PROMPT, "response": "Yes."}]}).status_code == 503
        upstream.load(checkpoint)
        wait_for(http, 200)
        assert rewards(http) == pytest.approx(expected, abs=1e-4)


def test_at_the_start_it_is_waited_for(described, upstream, expected):
    upstream.stop()
    with serving(**settings_for(described, upstream)) as server, client(server) as http:
        wait_for(http, 503, "still loading. The upstream cannot be reached")
        upstream.start()
        wait_for(http, 200)
        assert rewards(http) == pytest.approx(expected, abs=1e-4)


def test_a_text_that_it_refuses_fails_alone(checkpoint, upstream, expected):
    with serving(**settings_for(checkpoint, upstream)) as server, client(server) as http:
        wait_for(http, 200)
        encoder = load_encoder(checkpoint, most_tokens=512)
        others = {
            one
            for number, response in enumerate(RESPONSES)
            if number != 3
            for one in encoder.encode(PROMPT, response).ids
        }
        upstream.refused = next(one for one in encoder.encode(PROMPT, RESPONSES[3]).ids if one not in others)
        items = [{"prompt": PROMPT, "response": response} for response in RESPONSES]
        found = http.post("/score", json={"items": items}).json()["items"]
        assert [item.get("error", {}).get("code") for item in found] == [None, None, None, "forward_failed", None]
        kept = [item["reward"] for item in found if "reward" in item]
        assert kept == pytest.approx(expected[:3] + expected[4:], abs=1e-4)
        assert http.get("/readyz").status_code == 200


def test_prefixes_of_api_keys_are_kept_apart(checkpoint, upstream, tmp_path):
    keys = [add_key(tmp_path / "keys", name) for name in ("ann", "bob")]
    with serving(**settings_for(checkpoint, upstream, key_file=tmp_path / "keys")) as server, client(server) as http:
        wait_for(http, 200)
        upstream.bodies.clear()
        for key in keys:
            body = {"items": [{"prompt": PROMPT, "response": RESPONSES[0]}]}
            http.post("/score", json=body, headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    salts = [body["cache_salt"] for body, _ in upstream.bodies]
    assert len(set(salts)) == 2
    assert "ann" not in json.dumps(salts)


def test_its_key_is_sent_and_a_wrong_one_is_named(checkpoint, upstream, load, tmp_path):
    upstream.key = "secret"
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert load(checkpoint, upstream_key_file=file).reason_down is None
    file.write_text("wrong")
    with pytest.raises(UpstreamUnavailableError, match="refuses the API key"):
        load(checkpoint, upstream_key_file=file)
    file.write_text("")
    with pytest.raises(ConfigError, match="upstream_key_file"):
        load(checkpoint, upstream_key_file=file)


def test_other_golden_rewards_are_refused(checkpoint, load, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    manifest_of(checkpoint, reward_error=0.5).save(folder)
    with pytest.raises(GoldenMismatchError, match=r"golden\[0\]"):
        load(folder)


def test_probabilities_are_refused(checkpoint, upstream, load):
    upstream.always_activates = True
    with pytest.raises(ModelError, match="raw logits"):
        load(checkpoint)


def test_its_limit_of_tokens_is_ours(checkpoint, upstream, load):
    upstream.max_length = 128
    assert load(checkpoint).encoder.max_length == 128
    assert load(checkpoint, max_length=64).encoder.max_length == 64
    with pytest.raises(ConfigError, match="max_length = 256: the server that computes the rewards takes 128"):
        load(checkpoint, max_length=256)


def test_what_it_cannot_compute_is_refused(checkpoint, load, tmp_path):
    with pytest.raises(ModelError, match="may be an encoder"):
        load(tiny_checkpoint(tmp_path / "bert", "bert"))
    with pytest.raises(ModelError, match="process reward model"):
        load(checkpoint, steps="\\n\\n")
    with pytest.raises(ConfigError, match="--deterministic"):
        load(checkpoint, deterministic=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"upstreams": "http://host:8000"}, "give vllm=URL"),
        ({"upstreams": "vllm=host:8000"}, "give vllm=URL"),
        ({"upstreams": "a=vllm=http://h,a=vllm=http://i", "models": "a=x"}, "two upstreams are for one model"),
        ({"upstreams": "vllm=http://h", "models": "a=x,b=y"}, "name the one that it computes: a=vllm=URL"),
        ({"upstreams": "c=vllm=http://h", "models": "a=x,b=y"}, "no model is called 'c'"),
    ],
)
def test_an_invalid_upstream_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        Settings.load(**given)
