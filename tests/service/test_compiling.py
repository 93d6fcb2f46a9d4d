"""A server that compiles in a child process ends cleanly at any time, and the child with it."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from support.models import tiny_checkpoint
from support.server import ServerProcess

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")

# Tiny models are not worth it: compile them all the same. At its low priority the child would wait for other tests.
ALWAYS = """
import sys
from marginrm.tuning import compiled
from marginrm_service.models import compiling
compiled._LARGE = 0
ahead = "from marginrm.tuning import compile_ahead as ahead; ahead._NICE = 0; ahead.main()"
compiling._COMMAND = (sys.executable, "-c", ahead)
"""


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process as Linux tells them")
def test_sigterm_ends_the_compiler_too_and_exits_with_0(process: ServerProcess):
    wait_for("compiling its layers in the background", process)
    while not (found := children(process.process.pid)):
        time.sleep(0.05)
    process.signal(signal.SIGTERM)
    assert process.wait(120) == 0, process.log
    assert not any(Path(f"/proc/{child}").exists() for child in found)
    assert "Traceback" not in process.log
