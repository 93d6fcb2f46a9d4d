"""Ray Serve as its users run it: the shipped configuration, real replicas, a real proxy. Needs the extra `ray`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from marginrm import RewardModel
from marginrm.errors import ConfigError
from support.models import SENTENCES, tiny_checkpoint

pytestmark = pytest.mark.cluster
pytest.importorskip("ray", reason="needs the extra: pip install -c constraints.txt -e '.[ray]'")

SHIPPED = Path(__file__).parents[2] / "deploy/ray-serve/serve.yaml"
SERVE = Path(sys.executable).with_name("serve")
ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "marginrm_service.ray_serve.proxy.middleware",
    # A proxy that other tests keep from the cores is not a broken one.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
MANY = 200
STARTS = 10
TOO_SLOW = ("node timed out during startup", "ActorDiedError", "GetTimeoutError")  # Ray's own limits, of 30 and 60 s
PATIENCE = 600  # s. Ray starts processes of its own, which takes minutes where other tests keep both cores busy


class RayServe:
    """The shipped configuration in a cluster of this machine, with another model and port, and two replicas."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.values = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
        self.values["http_options"] = {"host": "127.0.0.1", "port": self.port}
        self.application["args"] = arguments
        self.deployment["ray_actor_options"]["num_cpus"] = 1
        self.scaling = self.deployment.pop("autoscaling_config")
        self.deployment["num_replicas"] = 2
        self.config, self.log_path = folder / "serve.yaml", folder / "serve.log"
        self.config.write_text(yaml.safe_dump(self.values), encoding="utf-8")
        self.start()

    def start(self) -> None:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [SERVE, "run", self.config],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.config.parent,
                env=ENVIRONMENT,
            )

    def wait_until_ready(self) -> None:
        """Waits for both replicas. Ray gives its own processes 30 s to start, which a busy machine may exceed."""
        for _ in range(STARTS):
            try:
                self.wait_for(self.ready)
            except AssertionError:
                if self.process.poll() is None or not any(text in self.log for text in TOO_SLOW):
                    raise
                self.start()
            else:
                return
        raise AssertionError(self.log)

    @property
    def application(self) -> dict[str, Any]:
        return self.values["applications"][0]

    @property
    def deployment(self) -> dict[str, Any]:
        return self.application["deployments"][0]

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
        """Whether both replicas answer."""
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE) as client:
                return client.get("/readyz").status_code == 200 and len(responses_by_replica(client)) == 2
        except httpx.TransportError:
            return False

    def deploy(self) -> None:
        self.config.write_text(yaml.safe_dump(self.values), encoding="utf-8")
        command = [SERVE, "deploy", "--address", self.dashboard, self.config]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)

    def status(self) -> str:
        """What `serve status` prints, on one line."""
        command = [SERVE, "status", "--address", self.dashboard]
        printed = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT).stdout
        return re.sub(r"[\s\\]+", " ", printed)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ServeReplica:marginrm" in " ".join(child.cmdline())]

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
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def client(ray_serve: RayServe) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{ray_serve.port}", timeout=PATIENCE) as opened:
        yield opened


def body(number: int) -> dict[str, Any]:
    return {"pairs": [{"prompt": f"Question {number}?", "chosen": SENTENCES[0], "rejected": SENTENCES[1]}]}


def samples(client: httpx.Client, name: str) -> dict[str, float]:
    """The values of a metric by replica, from one scrape."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["replica"]: sample.value for sample in found}


def by_model(client: httpx.Client, name: str) -> list[dict[str, str]]:
    """The labels of a metric of the application with several models."""
    families = text_string_to_metric_families(client.get("/many/metrics").text)
    return [sample.labels for family in families for sample in family.samples if sample.name == name]


def responses_by_replica(client: httpx.Client) -> Counter[str]:
    return Counter({replica: int(value) for replica, value in samples(client, "marginrm_step_responses_sum").items()})


def rewards(pair: dict[str, Any]) -> list[float]:
    return [pair["chosen"]["reward"], pair["rejected"]["reward"]]


async def answers(url: str, bodies: list[dict[str, Any]]) -> list[int]:
    """The status of each of these requests, sent at once and not sent again."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=httpx.Limits()) as client:
        replies = await asyncio.gather(*(client.post("/score", json=one) for one in bodies))
    return [reply.status_code for reply in replies]


def test_each_of_two_replicas_gives_the_librarys_rewards(client: httpx.Client, checkpoint: Path) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    before = responses_by_replica(client)
    local = RewardModel.from_pretrained(checkpoint, dtype="float32").score("Question 1?", list(SENTENCES[:2]))
    for session in range(20):  # Ray's header chooses the replica
        reply = client.post("/score", json=body(1), headers={"X-Session-ID": str(session)})
        assert rewards(reply.json()["pairs"][0]) == pytest.approx(local, abs=1e-5)
    counts = responses_by_replica(client) - before
    assert len(counts) == 2
    assert sum(counts.values()) == 40
    refused = client.post("/score", json={"pairs": []})
    assert refused.status_code == 422
    assert refused.json()["error"]["request_id"] == refused.headers["X-Request-ID"].split(",")[0]


def test_the_samples_of_a_prompt_go_to_one_replica_and_prompts_to_both(client: httpx.Client) -> None:
    used = Counter[str]()
    for prompt in range(20):
        before = responses_by_replica(client)
        answer = [{"items": [{"prompt": f"Prompt {prompt}?", "response": text}]} for text in SENTENCES[:4]]
        assert asyncio.run(answers(str(client.base_url), answer)) == [200] * 4
        counts = responses_by_replica(client) - before
        assert list(counts.values()) == [4]
        used += counts
    assert len(used) == 2


def test_concurrent_requests_share_steps(client: httpx.Client) -> None:
    before = sum(samples(client, "marginrm_step_tokens_count").values())
    assert asyncio.run(answers(str(client.base_url), [body(number) for number in range(MANY)])) == [200] * MANY
    assert sum(samples(client, "marginrm_step_tokens_count").values()) - before < MANY / 2


def test_a_replica_that_is_killed_with_requests_in_it_loses_none(ray_serve: RayServe, client: httpx.Client) -> None:
    stopped = ray_serve.replicas()[0]
    stopped.send_signal(signal.SIGSTOP)  # so that its requests cannot be answered before it dies

    async def kill_it_under_load() -> list[int]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=PATIENCE, limits=httpx.Limits()) as many:
            tasks = [asyncio.create_task(many.post("/score", json=body(number))) for number in range(40)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(1)
            waiting = sum(not task.done() for task in tasks)
            stopped.kill()
            statuses = [reply.status_code for reply in await asyncio.gather(*tasks)]
        assert waiting > 0
        return statuses

    assert asyncio.run(kill_it_under_load()) == [200] * 40
    ray_serve.wait_for(ray_serve.ready)


def test_a_new_version_in_mid_load_loses_no_request_and_scales_by_queued_tokens(
    ray_serve: RayServe, client: httpx.Client
) -> None:
    ray_serve.application["args"]["dtype"] = "bfloat16"
    del ray_serve.deployment["num_replicas"]
    # One replica for so few tokens, although Ray's own policy would want two for 20 requests at once.
    scaling = ray_serve.scaling | {"max_replicas": 2, "downscale_delay_s": 0}
    ray_serve.deployment["autoscaling_config"] = scaling
    statuses: list[int] = []
    ray_serve.deploy()
    deadline = time.monotonic() + PATIENCE
    while (
        client.get("/v1/models").json()["data"][0]["dtype"] != "bfloat16"
        or "status: HEALTHY" not in (status := ray_serve.status())
        or "RUNNING: 1" not in status
    ):
        statuses += asyncio.run(answers(str(client.base_url), [body(number) for number in range(20)]))
        assert time.monotonic() < deadline, ray_serve.log
    assert set(statuses) == {200}


def test_models_that_do_not_fit_one_replica_are_served_each_by_its_own(
    ray_serve: RayServe, client: httpx.Client, checkpoint: Path, tmp_path: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "other", "gpt_neox", seed=1)
    arguments = {
        "models": f"a={checkpoint},b={other}",
        "max_loaded_models": 1,
        "dtype": "float32",
        "reward_cache_mib": 0,
    }
    many = {**ray_serve.application, "name": "many", "route_prefix": "/many", "args": arguments}
    many["deployments"] = [
        {"name": "marginrm", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0, "num_gpus": 0}},
    ]
    ray_serve.values["applications"].append(many)
    ray_serve.deploy()
    ray_serve.wait_for(lambda: client.get("/many/readyz").status_code == 200)
    ray_serve.wait_for(lambda: len({s["replica"] for s in by_model(client, "marginrm_ready")}) == 2)
    local = {
        name: RewardModel.from_pretrained(path, dtype="float32") for name, path in (("a", checkpoint), ("b", other))
    }
    for number in range(12):
        name, prompt = "ab"[number % 2], f"Question {number}?"
        pair = {"prompt": prompt, "chosen": SENTENCES[0], "rejected": SENTENCES[1]}
        reply = client.post("/many/score", json={"model": name, "pairs": [pair]})
        assert reply.status_code == 200, reply.text
        expected = local[name].score(prompt, list(SENTENCES[:2]))
        assert rewards(reply.json()["pairs"][0]) == pytest.approx(expected, abs=1e-5)
    # Each replica has one model in memory, and each model one replica.
    held = [(s["model"], s["replica"]) for s in by_model(client, "marginrm_ready")]
    assert sorted(model for model, _ in held) == ["a", "b"]
    assert len({replica for _, replica in held}) == 2
    ray_serve.values["applications"].remove(many)


def test_a_model_that_cannot_be_served_fails_the_deployment_with_the_reason(
    ray_serve: RayServe, client: httpx.Client, tmp_path: Path
) -> None:
    broken = {**ray_serve.application, "name": "broken", "route_prefix": "/broken", "args": {"models": str(tmp_path)}}
    broken["deployments"] = [{"name": "marginrm", "ray_actor_options": {"num_cpus": 0, "num_gpus": 0}}]
    ray_serve.values["applications"].append(broken)
    ray_serve.deploy()
    ray_serve.wait_for(lambda: "DEPLOY_FAILED" in ray_serve.status())
    assert "has neither config.json nor adapter_config.json" in ray_serve.status()
    assert client.get("/readyz").status_code == 200


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
