"""The file for KubeRay: valid by KubeRay's schema and Kubernetes', and with a command that `marginrm score` takes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from marginrm.cli.main import build_app

FOLDER = Path(__file__).resolve().parents[2] / "deploy/ray-job"
SCHEMA = json.loads((FOLDER / "rayjob.schema.json").read_text(encoding="utf-8"))


def job() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))


def test_the_job_is_one_of_kuberay() -> None:
    jsonschema.validate(job(), SCHEMA)
    wrong = job()
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate(wrong, SCHEMA)


def test_its_pods_are_those_of_kubernetes(tmp_path: Path) -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template} for template in templates]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", "--quiet", tmp_path / "pods.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_command_is_one_of_marginrm() -> None:
    shell, option, script = shlex.split(job()["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    name, command, *arguments = shlex.split(script.partition(";")[0])
    assert (name, command) == ("marginrm", "score")
    score = get_command(build_app()).commands["score"]
    context = score.make_context("score", arguments)
    assert context.params["ray"] == "auto"
    mounts = {"/data", "/models"}
    assert all(f"/{path.split('/')[1]}" in mounts for path in arguments if path.startswith("/"))
