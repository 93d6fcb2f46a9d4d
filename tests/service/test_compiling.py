"""A server answers while a child process compiles its model, changes over, and ends cleanly at any time."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from support.models import tiny_checkpoint
from support.server import ServerProcess

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")

# Tiny models are not worth it, and their times say nothing: compile them all the same, and always change over. At its low
# priority the child would wait for other tests.
ALWAYS = """
import sys
from marginrm.tuning import compiled
from marginrm_service.models import compiling
compiled._LARGE = 0
compiled._WORTH_IT = 0.0
ahead = "from marginrm.tuning import compile_ahead as ahead; ahead._NICE = 0; ahead.main()"
compiling._COMMAND = (sys.executable, "-c", ahead)
"""
PAIR = {"pairs": [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}]}


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama")
    arguments = ("--model", checkpoint, "--dtype", "float32", "--reward-cache-mib", "0")
    with ServerProcess(tmp_path / "log", *arguments, before=ALWAYS) as process:
        process.wait_until_ready()
        yield process


def wait_for(text: str, process: ServerProcess) -> None:
    while text not in process.log:
        assert process.process.poll() is None, process.log
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_it_answers_meanwhile_and_changes_over(process: ServerProcess):
    wait_for("compiling its layers in the background", process)
    eager = httpx.post(f"{process.url}/score", json=PAIR, timeout=120).json()["pairs"]
    assert "marginrm_compiled{" in httpx.get(f"{process.url}/metrics").text
    wait_for("layers compiled (", process)
    card = httpx.get(f"{process.url}/v1/models").json()["data"][0]
    assert "layers compiled (" in card["forward_reason"]
    assert 'marginrm_compiled{model="default"} 1.0' in httpx.get(f"{process.url}/metrics").text
    compiled = httpx.post(f"{process.url}/score", json=PAIR, timeout=120).json()["pairs"]
    assert compiled[0]["margin"] == pytest.approx(eager[0]["margin"], abs=1e-5)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process as Linux tells them")
def test_sigterm_ends_the_compiler_too_and_exits_with_0(process: ServerProcess):
    wait_for("compiling its layers in the background", process)
    while not (found := children(process.process.pid)):
        time.sleep(0.05)
    process.signal(signal.SIGTERM)
    assert process.wait(120) == 0, process.log
    assert not any(Path(f"/proc/{child}").exists() for child in found)
    assert "Traceback" not in process.log
