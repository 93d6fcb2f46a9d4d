"""The fixtures are, byte for byte, what the clients' HTTP libraries write; checked where those are installed."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
SDK_VENV = os.environ.get("MARGINRM_TEST_SDK_VENV")

# aiohttp's json= sends OpenRLHF's, slime's and verl's requests, requests' json= LLaMA-Factory's.
CLIENTS = """
import asyncio, json, pathlib, sys
import aiohttp, cohere, requests

url, folder = sys.argv[1], pathlib.Path(sys.argv[2])
read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))

async def trainers():
    async with aiohttp.ClientSession() as session:
        for name in ("openrlhf_get_reward", "openrlhf_empty", "slime", "verl_vllm_classify", "verl_sglang_embeddings"):
            async with session.post(f"{url}/{name}.json", json=read(f"{name}.json")) as response:
                await response.read()

asyncio.run(trainers())
headers = {"Content-Type": "application/json"}
requests.post(f"{url}/llama_factory.json", json=read("llama_factory.json"), headers=headers)
for kind, path, client in (("v2", "v2/rerank", cohere.ClientV2), ("v1", "v1/rerank", cohere.Client)):
    client("key", base_url=url).rerank(**read(f"cohere_{kind}_rerank.json"))
"""


class Keep(BaseHTTPRequestHandler):
    """Keeps the bodies that come, by path."""

    def do_POST(self) -> None:
        self.server.kept[self.path.strip("/")] = self.rfile.read(int(self.headers["content-length"]))
        reply = b'{"id": "x", "results": []}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.skipif(
    not SDK_VENV, reason="MARGINRM_TEST_SDK_VENV names no environment with aiohttp, requests and cohere"
)
def test_the_fixtures_are_the_bytes_that_clients_send():
    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as server:
        server.kept = {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            python = Path(SDK_VENV) / "bin" / "python"
            subprocess.run([python, "-c", CLIENTS, url, FIXTURES], check=True, timeout=120)
        finally:
            server.shutdown()
            thread.join()
    assert len(server.kept) == 8
    for name, sent in server.kept.items():
        fixture = f"cohere_{name[:2]}_rerank.json" if name.endswith("rerank") else name
        assert sent == (FIXTURES / fixture).read_bytes(), json.loads(sent)
