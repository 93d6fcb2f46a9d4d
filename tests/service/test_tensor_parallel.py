"""`marginrm serve --tensor-parallel 2` on CPUs: rewards of one process, the death of another one, and no process left over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import ServerProcess
from support.upstream import rewards_by_transformers

PROMPT = "Why does bread rise?"
RESPONSES = [f"Yeast eats sugar, {number} times." for number in range(5)]


def children(pid: int) -> list[int]:
    """The processes that a process has started with multiprocessing, apart from its resource tracker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (OSError, ProcessLookupError):
            continue
        if parent == pid and "spawn_main" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.timeout(1200)  # two processes that import torch, on a machine that others use
def test_a_shared_model_is_served_and_its_processes_end_together(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3", chat_template=CHATML_TEMPLATE, kv_heads=2)
    arguments = ("--model", checkpoint, "--dtype", "float32", "--device", "cpu", "--tensor-parallel", "2")
    with ServerProcess(tmp_path / "log", *arguments, "--token-budget", "512", "--reward-cache-mib", "0") as server:
        server.wait_until_ready(600)
        with httpx.Client(base_url=server.url, timeout=120) as http:
            body = {"items": [{"prompt": PROMPT, "response": response} for response in RESPONSES]}
            found = [item["reward"] for item in http.post("/score", json=body).raise_for_status().json()["items"]]
            assert found == pytest.approx(rewards_by_transformers(checkpoint, PROMPT, RESPONSES), abs=1e-5)
            (card,) = http.get("/v1/models").json()["data"]
            assert "shared among 2 processes" in card["forward_reason"]
            (other,) = children(server.process.pid)
            os.kill(other, signal.SIGTERM)  # systemd and terminals send it to all; rank 0 alone heeds it
            http.post("/score", json=body).raise_for_status()
            os.kill(other, signal.SIGKILL)
            assert http.post("/score", json=body).status_code == 503
            assert http.get("/healthz").status_code == 503  # only a new process helps
        server.signal(signal.SIGTERM)
        assert server.wait(300) == 0
        assert not Path(f"/proc/{other}").exists()
