"""Ray Serve as its users run it: the shipped configuration, real replicas, a real proxy. Needs the extra `ray`."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from marginrm import RewardModel
from marginrm.errors import ConfigError
from support.models import SENTENCES, tiny_checkpoint

pytest.importorskip("ray", reason="needs the extra: pip install -c constraints.txt -e '.[ray]'")

SHIPPED = Path(__file__).parents[2] / "deploy/ray-serve/serve.yaml"
SERVE = Path(sys.executable).with_name("serve")
ENVIRONMENT = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
MANY = 200
PATIENCE = 600  # s. Ray starts processes of its own, which takes minutes where other tests keep both cores busy


class RayServe:
    """The shipped configuration in a cluster of this machine, with another model and port."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        application = config["applications"][0]
        application["args"] = arguments
        application["deployments"][0]["ray_actor_options"]["num_cpus"] = 1
        self.config, self.log_path = folder / "serve.yaml", folder / "serve.log"
        self.config.write_text(yaml.safe_dump(config), encoding="utf-8")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [SERVE, "run", self.config], stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=ENVIRONMENT
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    @property
    def dashboard(self) -> str:
        """Where `serve deploy` and `serve status` ask."""
        return re.findall(r"dashboard at (?:\x1b\[\d*m)*(http://[\d.:]+)", self.log)[0]

    def wait_for(self, found: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def status(self) -> str:
        command = [SERVE, "status", "--address", self.dashboard]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT).stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()  # where tests run in the background, SIGINT is ignored
        try:
            self.process.wait(120)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "gpt_neox")


@pytest.fixture(scope="module")
def ray_serve(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServe]:
    folder = tmp_path_factory.mktemp("ray")
    with RayServe(folder, models=str(checkpoint), dtype="float32", reward_cache_mib=0) as started:
        started.wait_for(started.ready)
        yield started


@pytest.fixture(scope="module")
def client(ray_serve: RayServe) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{ray_serve.port}", timeout=120) as opened:
        yield opened


def body(number: int) -> dict[str, Any]:
    return {"pairs": [{"prompt": f"Question {number}?", "chosen": SENTENCES[0], "rejected": SENTENCES[1]}]}


def counted(client: httpx.Client, name: str) -> float:
    return float(re.findall(rf"^{name}\{{.*\}} (\S+)$", client.get("/metrics").text, re.MULTILINE)[0])


def test_a_deployment_is_ready_with_its_model_and_gives_the_librarys_rewards(
    client: httpx.Client, checkpoint: Path
) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    pair = client.post("/score", json=body(1)).json()["pairs"][0]
    local = RewardModel.from_pretrained(checkpoint, dtype="float32").score("Question 1?", list(SENTENCES[:2]))
    assert [pair["chosen"]["reward"], pair["rejected"]["reward"]] == pytest.approx(local, abs=1e-5)
    refused = client.post("/score", json={"pairs": []})
    assert refused.status_code == 422
    assert refused.json()["error"]["request_id"] == refused.headers["X-Request-ID"].split(",")[0]


def test_concurrent_requests_share_steps(client: httpx.Client) -> None:
    before = counted(client, "marginrm_step_tokens_count")
    assert asyncio.run(answers(str(client.base_url), MANY)) == [200] * MANY
    assert counted(client, "marginrm_step_tokens_count") - before < MANY / 5


async def answers(url: str, count: int) -> list[int]:
    """The status of each of so many requests at once."""
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits()) as client:
        replies = await asyncio.gather(*(client.post("/score", json=body(number)) for number in range(count)))
    return [reply.status_code for reply in replies]


def test_a_new_version_in_mid_load_loses_no_request(ray_serve: RayServe, client: httpx.Client) -> None:
    config = ray_serve.config.read_text(encoding="utf-8").replace("float32", "bfloat16")
    ray_serve.config.write_text(config, encoding="utf-8")
    statuses: list[int] = []
    command = [SERVE, "deploy", "--address", ray_serve.dashboard, ray_serve.config]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    deadline = time.monotonic() + PATIENCE
    while client.get("/v1/models").json()["data"][0]["dtype"] != "bfloat16":
        statuses += asyncio.run(answers(str(client.base_url), 20))
        assert time.monotonic() < deadline, ray_serve.log
    assert set(statuses) == {200}


def test_a_model_that_cannot_be_served_fails_the_deployment_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with RayServe(tmp_path, models=str(tmp_path / "empty")) as started:
        started.wait_for(lambda: "Submitted deploy config" in started.log)
        started.wait_for(lambda: "DEPLOY_FAILED" in started.status())
        assert "empty has neither config.json nor adapter_config.json" in started.status()
        assert not started.ready()


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # Ray's own
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no model to serve. Give models=PATH"),
        ({"models": "m", "port": "9000"}, "port cannot be set on Ray Serve: .*http_options"),
        ({"models": "m", "admin_key_file": "k"}, "admin_key_file cannot be set on Ray Serve: .*one replica"),
        ({"models": "m", "rate_limit": 5}, "rate_limit cannot be set on Ray Serve: each replica"),
        ({"model": "m"}, "model: Extra inputs are not permitted"),
    ],
)
def test_settings_that_ray_replaces_are_refused(arguments: dict[str, Any], message: str) -> None:
    from marginrm_service.ray_serve import app

    with pytest.raises(ConfigError, match=message):
        app(arguments)
