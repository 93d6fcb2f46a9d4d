"""Injected faults in real servers with tiny real models, and the effect that each may have.

| fault | effect |
|---|---|
| forward raises on one response | that response gets `forward_failed`; its neighbours their rewards; counted |
| forward raises on all | every response gets `forward_failed`; ready; the next request is scored |
| a reward is NaN | that response gets `non_finite_reward`; neighbours their rewards; counted apart |
| out of memory (torch's error, or the allocator's) | the step is tried in halves, in the memory it gave back: rewards for all |
| forward does not end | 504 at the deadline, not ready; ready and right again when it ends |
| tokenizer raises, or panics, on a text | that response gets `tokenizer_failed`; neighbours their rewards |
| the worker dies | 503 with `Retry-After` for waiting and later requests; not ready, not alive |
| checkpoint corrupt, truncated, unreadable, with a wrong head, without tokenizer, golden mismatch | refused with the reason; the old model answers on; at the start the process ends with the reason (`test_process`) |
| disk full while a model is fetched from a Hub | the process ends with the reason |
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from marginrm import RewardModel
from marginrm.encoding import Encoder
from marginrm.manifest import EncodingInfo, GoldenSample, Manifest
from marginrm.steps import StepResult
from marginrm_service.keys import add_key
from support.models import tiny_checkpoint, tiny_model
from support.server import serving
from support.service import Gate, Groups

TOLERANCE = 1e-5
PROMPT = "Why does bread rise?"
RESPONSES = [f"Yeast eats sugar, {number} times." for number in range(6)]
BAD = 2  # which of them is at fault


class FaultyModel(RewardModel):
    """A reward model whose forward pass does something else first."""

    before_forward: Callable[[Groups], None] = staticmethod(lambda _: None)

    def run_step(self, groups: Groups, tenants=None) -> StepResult:
        self.before_forward(groups)
        return super().run_step(groups, tenants)


class FaultyEncoder(Encoder):
    """An encoder that fails on one text."""

    fault: BaseException

    def encode_group(self, prompt, responses, truncation="error"):
        if RESPONSES[BAD] in responses:
            raise self.fault
        return super().encode_group(prompt, responses, truncation)


class PanicException(BaseException):
    """What a panic in Rust becomes: pyo3's class of that name cannot be imported."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("faults") / "model", "llama")


@pytest.fixture
def model(checkpoint) -> FaultyModel:
    return FaultyModel.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[float]:
    return RewardModel.from_pretrained(checkpoint, dtype="float32").score(PROMPT, RESPONSES)


@pytest.fixture
def http(model) -> Iterator[httpx.Client]:
    with (
        serving(model, stall_seconds=0.2, reward_cache_mib=0) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client


def ask(http: httpx.Client, **headers: str) -> httpx.Response:
    items = [{"prompt": PROMPT, "response": response} for response in RESPONSES]
    return http.post("/score", json={"items": items}, headers=headers)


def metric(http: httpx.Client, sample: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample)), 0.0)


def check_only_the_bad_one_fails(items: list[dict], code: str, expected: list[float]) -> None:
    assert [item["index"] for item in items if "error" in item] == [BAD]
    assert items[BAD]["error"]["code"] == code
    for number, item in enumerate(items):
        if number != BAD:
            assert item["reward"] == pytest.approx(expected[number], abs=TOLERANCE)


def check_all_is_well(http: httpx.Client, expected: list[float]) -> None:
    rewards = [item["reward"] for item in ask(http).raise_for_status().json()["items"]]
    assert rewards == pytest.approx(expected, abs=TOLERANCE)
    assert http.get("/readyz").status_code == 200


def test_forward_raises_on_one_response(http, model, expected):
    poison = model.encoder.encode(PROMPT, RESPONSES[BAD]).ids

    def choke(groups: Groups) -> None:
        if any(member.ids == poison for group in groups for member in group):
            raise RuntimeError("the device says no")

    model.before_forward = choke
    check_only_the_bad_one_fails(ask(http).raise_for_status().json()["items"], "forward_failed", expected)
    assert metric(http, "marginrm_forward_faults_total") > 0
    assert metric(http, 'marginrm_item_errors_total{code="forward_failed",model="default"}') == 1
    model.before_forward = lambda _: None
    check_all_is_well(http, expected)


def test_forward_raises_on_all(http, model, expected, caplog):
    def choke(groups: Groups) -> None:
        raise RuntimeError("the device says no")

    model.before_forward = choke
    errors = [item["error"]["code"] for item in ask(http).raise_for_status().json()["items"]]
    assert errors == ["forward_failed"] * len(RESPONSES)
    assert http.get("/readyz").status_code == 200
    levels = [record.levelname for record in caplog.records if record.name == "marginrm_service.engine.step"]
    assert sorted(levels) == ["ERROR", "WARNING"]  # not one for each response
    model.before_forward = lambda _: None
    check_all_is_well(http, expected)


def test_a_reward_is_nan(http, model, expected):
    """The weights give NaN by themselves: the embedding of a token that one response has alone is NaN."""
    ids = [set(model.encoder.encode(PROMPT, response).ids) for response in RESPONSES]
    (token, *_) = ids[BAD] - set.union(*(others for number, others in enumerate(ids) if number != BAD))
    weights = model.module.classifier.get_input_embeddings().weight.data
    sound = weights[token].clone()
    weights[token] = float("nan")
    check_only_the_bad_one_fails(ask(http).raise_for_status().json()["items"], "non_finite_reward", expected)
    assert metric(http, "marginrm_non_finite_rewards_total") == 1
    weights[token] = sound
    check_all_is_well(http, expected)
    assert metric(http, "marginrm_non_finite_rewards_total") == 1


class Activations:
    """Something large that a forward pass holds."""


@pytest.mark.parametrize("allocator", ["torch", "device"])
def test_out_of_memory(http, model, expected, allocator):
    """A step of more than two responses needs more memory than there is, and the next one needs what it held."""
    held: list[weakref.ref[Activations]] = []

    def allocate(groups: Groups) -> None:
        assert all(reference() is None for reference in held), "the failed pass still holds its memory"
        activations = Activations()
        held.append(weakref.ref(activations))
        if sum(map(len, groups)) > 2:
            if allocator == "torch":
                torch.empty(2**60, dtype=torch.uint8)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.before_forward = allocate
    items = ask(http).raise_for_status().json()["items"]
    assert [item["reward"] for item in items] == pytest.approx(expected, abs=TOLERANCE)
    assert len(held) > 1
    assert metric(http, "marginrm_forward_faults_total") > 0


def test_forward_does_not_end(http, model, expected):
    gate = Gate()
    model.before_forward = gate
    with ThreadPoolExecutor() as pool:
        late = pool.submit(ask, http, **{"X-Request-Timeout": "1"})
        assert gate.entered.acquire(timeout=120)
        queued = pool.submit(ask, http, **{"X-Request-Timeout": "1"})
        assert http.get("/readyz").status_code == 200  # a step may take a while
        assert [future.result(30).status_code for future in (late, queued)] == [504, 504]
        unready = http.get("/readyz")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "not_ready")
        assert "does not end" in unready.json()["error"]["message"]
        assert metric(http, "marginrm_ready") == 0
        assert http.get("/healthz").status_code == 200
        patient = pool.submit(ask, http)
        model.before_forward = lambda _: None
        gate.open()
        assert patient.result(30).status_code == 200
    check_all_is_well(http, expected)
    assert metric(http, "marginrm_ready") == 1


@pytest.mark.parametrize("fault", [ValueError("bad vocabulary"), PanicException("index out of bounds")])
def test_tokenizer_raises(http, model, expected, fault):
    sound = model.encoder
    model.encoder = FaultyEncoder(sound.tokenizer, max_length=sound.max_length, architecture=sound.architecture)
    model.encoder.fault = fault
    with serving(model, reward_cache_mib=0) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        one_prompt = client.post("/best-of-n", json={"prompts": [{"prompt": PROMPT, "candidates": RESPONSES}]}).json()
        (prompt,) = one_prompt["prompts"]
        assert [(one["candidate"], one["error"]["code"]) for one in prompt["errors"]] == [(BAD, "tokenizer_failed")]
        rewards = {entry["candidate"]: entry["reward"] for entry in prompt["ranking"]}
        assert rewards == pytest.approx({n: r for n, r in enumerate(expected) if n != BAD}, abs=TOLERANCE)
        check_only_the_bad_one_fails(ask(client).json()["items"], "tokenizer_failed", expected)
        alone = client.post("/score", json={"items": [{"prompt": PROMPT, "response": RESPONSES[BAD]}]})
        assert (alone.status_code, alone.json()["error"]["code"]) == (500, "tokenizer_failed")
        assert client.get("/readyz").status_code == 200


def test_the_worker_dies(http, model):
    class Fatal(BaseException):
        pass

    def die(groups: Groups) -> None:
        raise Fatal

    model.before_forward = die
    waiting, coming = ask(http), ask(http)
    for reply in (waiting, coming):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_stopped")
        assert int(reply.headers["retry-after"]) >= 1
    assert http.get("/readyz").status_code == 503
    lost = http.get("/healthz")
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "not_ready")
    assert "Restart" in lost.json()["error"]["message"]
    assert metric(http, "marginrm_ready") == 0


def corrupt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def corrupt_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def unreadable(folder: Path) -> None:
    """Reading this file is an error of the disk (EIO), whoever reads it."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/proc/self/mem")


def two_labels(folder: Path) -> None:
    tokenizer = RewardModel.from_pretrained(folder, dtype="float32").encoder.tokenizer
    tiny_model("llama", tokenizer, num_labels=2).save_pretrained(folder)


def language_model(folder: Path) -> None:
    config = RewardModel.from_pretrained(folder, dtype="float32").module.config
    LlamaForCausalLM(config).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def corrupt_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def golden_mismatch(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder, dtype="float32")
    ids = list(model.encoder.encode(PROMPT, RESPONSES[0]).ids)
    reward = model.score(PROMPT, RESPONSES[:1])[0] + 0.5
    Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny",
        encoding=EncodingInfo.model_validate(model.encoder.describe().model_dump()),
        golden=[GoldenSample(prompt=PROMPT, response=RESPONSES[0], ids=ids, reward=reward)],
        golden_tolerance={"float32": 1e-4},
    ).save(folder)


CHECKPOINT_FAULTS = {
    corrupt: "Cannot load the weights",
    corrupt_configuration: "config.json is not valid JSON",
    truncated: "Cannot load the weights",
    unreadable: "Input/output error",
    two_labels: "label",
    language_model: "a causal language model",
    no_tokenizer: "tokenizer",
    corrupt_tokenizer: "Cannot load the tokenizer",
    golden_mismatch: "golden[0]: reward",
}


@pytest.fixture(scope="module")
def admin(checkpoint, tmp_path_factory) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "admin"
    key = add_key(keys, "root")
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    with (
        serving(model, admin_key_file=keys, dtype="float32", reward_cache_mib=0) as server,
        httpx.Client(base_url=server.url, timeout=120, headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        yield client


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS, ids=lambda fault: fault.__name__)
def test_a_checkpoint_that_cannot_be_served_changes_nothing(admin, checkpoint, expected, tmp_path, fault):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    fault(broken)
    reply = admin.post("/admin/models", json={"name": "default", "path": str(broken)})
    assert reply.status_code == 422, reply.text
    assert CHECKPOINT_FAULTS[fault] in reply.json()["error"]["message"]
    check_all_is_well(admin, expected)


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as it takes to fetch one folder."""

    def __init__(self, folder: Path) -> None:
        def entry(file: Path) -> dict[str, object]:
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                if self.path.startswith("/api/models/tiny/model/revision/"):
                    self._send({"id": "tiny/model", "sha": "0" * 40})
                    return
                if self.path.startswith("/api/models/tiny/model/tree/"):
                    self._send([entry(file) for file in folder.iterdir()])
                    return
                file = folder / self.path.split("?")[0].rpartition("/")[2]
                if "/resolve/" not in self.path or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{file.name}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def _send(self, value: object) -> None:
                content = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def test_disk_full_while_a_model_is_fetched(checkpoint, tmp_path):
    """The cache lies on a file system that holds the configuration and not the weights."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k tmpfs {cache}"
    if not shutil.which("unshare") or subprocess.run([*mounted, mount], capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    hub = Hub(checkpoint)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    serve = f"{sys.executable} -c 'from marginrm.cli.main import main; main()' serve --port 0 --model tiny/model"
    environment = {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_DISABLE_XET": "1",
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [*mounted, f"{mount} && exec {serve}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "Cannot load the files of tiny/model" in last, done.stderr
    assert "No space left on device" in last
