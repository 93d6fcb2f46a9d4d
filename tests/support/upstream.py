"""An upstream as the service sees one: a server with vLLM's `/pooling`, whose rewards plain transformers computes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Upstream:
    """Computes a checkpoint's rewards on a port that it keeps when it is stopped and started again.

    Attributes:
        bodies: Bodies of the `/pooling` requests so far, with their headers.
        refused: Sequences with this token are answered 400, as vLLM answers what it does not take.
        always_activates: It applies its activation even if the request declines it, as a vLLM that does not know the field.
        max_length: The limit that it states.
    """

    def __init__(self, checkpoint: Path, *, max_length: int = 512, key: str | None = None) -> None:
        self.bodies: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.refused: int | None = None
        self.always_activates = False
        self.max_length = max_length
        self.key = key
        self._port = 0
        self._connections: list[socket.socket] = []
        self.load(checkpoint)

    def load(self, checkpoint: Path) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def start(self) -> Self:
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                upstream._connections.append(self.connection)

            def do_GET(self) -> None:
                models = [{"id": "rm", "max_model_len": upstream.max_length, "parent": None}]
                self.reply(200, {"data": models} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                upstream.bodies.append((body, dict(self.headers)))
                if any(upstream.refused in ids for ids in body["input"]):
                    self.reply(400, {"error": {"message": "no", "code": 400}})
                    return
                rows = upstream.rewards(body["input"], activation=body.get("use_activation", True))
                self.reply(200, {"data": [{"index": index, "data": [one]} for index, one in enumerate(rows)]})

            def reply(self, status: int, content: dict[str, Any]) -> None:
                if upstream.key and self.headers.get("Authorization") != f"Bearer {upstream.key}":
                    status, content = 401, {}
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends as a killed process does: with its connections."""
        self._server.shutdown()
        self._server.server_close()
        while self._connections:
            with contextlib.suppress(OSError):  # it was closed by the other side
                self._connections.pop().shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def rewards(self, sequences: list[list[int]], *, activation: bool) -> list[float]:
        with torch.inference_mode():
            raw = torch.stack([self.model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
        return (raw.sigmoid() if activation or self.always_activates else raw).tolist()


def rewards_by_transformers(checkpoint: Path, prompt: str, responses: list[str]) -> list[float]:
    """What a user of plain transformers gets: chat template, tokenizer and classifier, one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for response in responses:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            found.append(model(**inputs).logits[0, 0].item())
    return found


class VllmServer:
    """A real vLLM server on CPUs, in an environment of its own (docs/benchmarks.md has how to make it).

    Args:
        python: The environment's interpreter.
        checkpoint: The model.
        log: File for its output.
    """

    def __init__(self, python: Path, checkpoint: Path, log: Path) -> None:
        libraries = python.parent.parent / "lib"
        preload = [libraries / name for name in ("libtcmalloc_minimal.so.4", "libiomp5.so")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._environment = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(str(path) for path in preload if path.exists()),
        }
        self._command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
        self._command += ["--runner", "pooling", "--convert", "classify", "--dtype", "float32", "--enforce-eager"]
        self._command += ["--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )
        with httpx.Client(base_url=self.url, timeout=10) as client:
            while not self._answers(client):
                assert self._process.poll() is None, self._log.read_text()[-3000:]
                time.sleep(0.2)
        return self

    def kill(self) -> None:
        """Kills it with its engine's process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get("/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
