"""The trainers' own client functions, run from checkouts of their repositories: what they send, and what they receive.

`MARGINRM_TEST_CLIENTS` names a folder of git repositories, bare or not, `OWNER+NAME` or `OWNER+NAME/repo`; and
`MARGINRM_TEST_SDK_VENV` an environment with aiohttp, requests, pydantic and dacite. docs/contracts.md lists both.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from marginrm.reward_model import RewardModel
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import serving

FIXTURES = Path(__file__).parent / "fixtures"
PROGRAM = Path(__file__).parents[1] / "support" / "trainer_clients.py"
CLIENTS, SDK_VENV = os.environ.get("MARGINRM_TEST_CLIENTS"), os.environ.get("MARGINRM_TEST_SDK_VENV")
SOURCES: dict[str, tuple[str, list[str]]] = {
    "openrlhf": ("OpenRLHF+OpenRLHF", ["openrlhf/utils/agent.py"]),
    "slime": ("THUDM+slime", ["slime/rollout/rm_hub/__init__.py"]),
    "llama_factory": ("hiyouga+LLaMA-Factory", ["src/llamafactory/train/ppo/ppo_utils.py"]),
    "verl": ("verl-project+verl", ["verl/experimental/reward_loop/reward_loop.py"]),
    "verl_0_8": ("volcengine+verl", ["verl/experimental/reward_loop/reward_loop.py"]),
    "nemo_gym": ("NVIDIA-NeMo+Gym", ["resources_servers/genrm_compare/comparison_strategies.py"]),
    "ms_swift": ("modelscope+ms-swift", ["swift/infer_engine/protocol.py", "swift/infer_engine/infer_client.py"]),
}


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def sources() -> dict[str, Any]:
    """The text of each client's files; clients without a checkout are left out."""
    if not CLIENTS or not SDK_VENV:
        pytest.skip("MARGINRM_TEST_CLIENTS and MARGINRM_TEST_SDK_VENV name no checkouts and environment")
    found: dict[str, Any] = {}
    for name, (repository, files) in SOURCES.items():
        folder = next((f for f in (Path(CLIENTS, repository, "repo"), Path(CLIENTS, repository)) if f.is_dir()), None)
        if folder:
            show = [["git", "-C", str(folder), "show", f"HEAD:{file}"] for file in files]
            texts = [subprocess.run(one, check=True, capture_output=True, text=True).stdout for one in show]
            found[name] = texts if len(texts) > 1 else texts[0]
    if not found:
        pytest.skip(
            f"MARGINRM_TEST_CLIENTS holds none of {', '.join(repository for repository, _ in SOURCES.values())}"
        )
    return found


def run_clients(url: str, sent: dict[str, Any]) -> dict[str, Any]:
    given = {"url": url, "sources": sources(), "sent": sent}
    done = subprocess.run(
        [Path(SDK_VENV or "") / "bin" / "python", PROGRAM],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_in_the_fixtures() -> dict[str, Any]:
    return {
        "openrlhf": fixture("openrlhf_get_reward"),
        "slime": [fixture("slime"), fixture("slime_rendered")],
        "llama_factory": fixture("llama_factory")["messages"],
        "verl": fixture("verl_vllm_classify")["input"],
        "verl_0_8": fixture("verl_vllm_activation")["input"],
        "nemo_gym": fixture("nemo_gym_compare"),
        "ms_swift": fixture("ms_swift_chat")["messages"],
    }


class Keep(BaseHTTPRequestHandler):
    """Keeps the bodies that come, and answers with fields for every client."""

    def do_POST(self) -> None:
        self.server.kept.append(self.rfile.read(int(self.headers["content-length"])))
        data = [{"probs": [0.0], "embedding": [0.0]}]
        message = {"role": "assistant", "content": "0.0"}
        usage = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        chat = {"object": "chat.completion", "model": "m", "usage": usage, "choices": choices}
        self.answer({"rewards": [0.0], "scores": [0.0], "data": data, **chat})

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "default"}]})

    def answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_fixtures_are_the_bytes_that_the_clients_code_sends():
    expected = {
        "openrlhf": ["openrlhf_get_reward", "openrlhf_empty"],
        "slime": ["slime", "slime_rendered"],
        "llama_factory": ["llama_factory"],
        "verl": ["verl_vllm_classify", "verl_sglang_embeddings"],
        "verl_0_8": ["verl_vllm_activation", "verl_sglang_embeddings"],
        "nemo_gym": ["nemo_gym_compare"],
        "ms_swift": ["ms_swift_chat"],
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as server:
        server.kept = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            ran = run_clients(f"http://127.0.0.1:{server.server_port}", as_in_the_fixtures())
        finally:
            server.shutdown()
            thread.join()
    names = [name for client in ran for name in expected[client]]
    assert sorted(server.kept) == sorted((FIXTURES / f"{name}.json").read_bytes() for name in names)


def test_each_client_receives_the_reward_of_score(tmp_path):
    sources()
    model = RewardModel.from_pretrained(
        tiny_checkpoint(tmp_path, "qwen3", chat_template=CHATML_TEMPLATE), dtype="float32"
    )
    with serving(model) as running, httpx.Client(base_url=running.url, timeout=120) as http:
        sent = as_in_the_fixtures()
        received = run_clients(running.url, sent)
        history, (question, answer) = sent["nemo_gym"]["conversation_history"], sent["ms_swift"]
        pairs = [("Hi", "Hello é"), ("Hi", "Hello"), ("Hi", "No."), (question["content"], answer["content"])]
        pairs += [(history, text) for text in ("Paris is the capital.", "The capital of France is Paris.")]
        items = [{"prompt": prompt, "response": response} for prompt, response in pairs]
        rewards = [item["reward"] for item in http.post("/score", json={"items": items}).json()["items"]]
    hello, greeting, no, name, first, second = (pytest.approx(reward, abs=1e-5) for reward in rewards)
    if "openrlhf" in received:
        assert [one["rewards"] for one in received["openrlhf"]] == [[hello], []]
    if "slime" in received:
        assert received["slime"] == [greeting, greeting]
    if "llama_factory" in received:
        assert received["llama_factory"] == [hello, no]
    for version in {"verl", "verl_0_8"} & received.keys():
        assert received[version] == [hello, hello]
    if "nemo_gym" in received:
        assert received["nemo_gym"][0] == [first, second]
    if "ms_swift" in received:
        assert received["ms_swift"] == name
