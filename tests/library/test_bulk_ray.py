"""`marginrm score --ray`: the bytes of the plain command, also when an actor is killed. Needs the extra `ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from marginrm.bulk.ray_pool import RayOptions
from marginrm.errors import ConfigError
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint

pytest.importorskip("ray", reason="needs the extra: pip install -c constraints.txt -e '.[ray]'")

PAIRS = [
    {"prompt": f"Question {number // 3}?", "chosen": SENTENCES[number % 8], "rejected": SENTENCES[(number + 1) % 8]}
    for number in range(600)
]
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.cluster
def test_an_actor_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama", chat_template=CHATML_TEMPLATE)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, {"prompt": "Hi?", "response": ""}]))
    command = [Path(sys.executable).with_name("marginrm"), "score", source, "-m", checkpoint, "--dtype", "float32"]
    command += ["--shard-rows", "6", "-o"]
    plain = subprocess.run([*command, f"{tmp_path}/plain/"], check=False, capture_output=True, env=ENVIRONMENT)
    assert plain.returncode == 3
    arguments = [*command, f"{tmp_path}/ray/", "--ray", "local", "--ray-actors", "1:2"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while len(list((tmp_path / "ray").glob("part-*"))) < 10:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        actors = [one for one in children if any(part.startswith("ray::_Scorer") for part in one.cmdline())]
        actors[0].kill()
        printed, errors = process.communicate()
    assert process.returncode == 3, errors
    assert b"601 rows, 1 with errors" in printed
    assert b"601 rows scored" in printed
    folders = [sorted((tmp_path / name).glob("part-*")) for name in ("plain", "ray")]
    assert [part.name for part in folders[0]] == [part.name for part in folders[1]]
    assert [part.read_bytes() for part in folders[0]] == [part.read_bytes() for part in folders[1]]


@pytest.mark.parametrize("text", ["0", "2:1", "many", ":3", "1:x"])
def test_bounds_that_are_not_bounds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ray-actors"):
        RayOptions.bounds(text)
