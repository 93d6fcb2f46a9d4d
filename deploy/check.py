"""Checks the deployment files without starting anything: Compose, Dockerfile, Kubernetes, Prometheus.

`make check` runs it. Each check prints its command. A check that cannot run here prints the reason.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = "deploy/kubernetes"
OVERLAY = "deploy/kubernetes-keys"
COMPOSE = ("compose.yaml", "deploy/compose.keys.yaml")
PROMETHEUS = ("docker/prometheus.yml", "docker/prometheus.keys.yml")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one check.

    Attributes:
        status: `ok`, `failed`, or `not checked` if its tool is not on this machine.
        what: The command that ran, or the check that could not run.
        detail: The output of the tool, or the reason why it did not run.
    """

    status: Literal["ok", "failed", "not checked"]
    what: str
    detail: str = ""


def find_tool(name: str) -> str | None:
    """Returns the path of a tool in this environment, or else on this machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run_tool(tool: str, *arguments: str) -> Outcome:
    """Runs a tool of the dev extra in the repository root. A missing tool is a failure, because setup installs it."""
    path = find_tool(tool)
    what = " ".join([tool, *arguments])
    if path is None:
        return Outcome("failed", what, f"{tool} is missing: run `make setup`")
    done = subprocess.run([path, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return Outcome("failed" if done.returncode else "ok", what, done.stdout + done.stderr if done.returncode else "")


def has_compose_plugin() -> bool:
    """Returns whether `docker compose` works here; checking a file needs no engine."""
    docker = find_tool("docker")
    if docker is None:
        return False
    return subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0


def check_compose() -> list[Outcome]:
    """Checks the Compose files against the specification, and with Compose itself if it is installed."""
    outcomes = [run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file) for file in COMPOSE]
    if has_compose_plugin():
        files = [argument for file in COMPOSE for argument in ("--file", file)]
        outcomes.append(run_tool("docker", "compose", *files, "config", "--quiet"))
    else:
        reason = "the docker compose plugin is not installed; only the schema was checked"
        outcomes.append(Outcome("not checked", "docker compose config", reason))
    return outcomes


def check_dockerfile() -> list[Outcome]:
    """Lints the Dockerfile; the linter's wheel exists for x86-64 and arm64 only."""
    if find_tool("hadolint") is None:
        return [Outcome("not checked", "hadolint docker/Dockerfile", "no hadolint for this platform")]
    return [run_tool("hadolint", "docker/Dockerfile")]


def check_kubernetes() -> list[Outcome]:
    """Checks the manifests strictly: rendered by kustomize if kubectl is installed, else file by file."""
    kubectl = find_tool("kubectl")
    if kubectl is None:
        resources = [f for f in sorted((ROOT / MANIFESTS).glob("*.yaml")) if f.name != "kustomization.yaml"]
        paths = [str(path.relative_to(ROOT)) for path in resources]
        reason = "kubectl is not installed; the manifests were checked one by one"
        return [
            run_tool("kubernetes-validate", "--strict", "--quiet", *paths),
            Outcome("not checked", f"kubectl kustomize {OVERLAY}", reason),
        ]
    return [outcome for folder in (MANIFESTS, OVERLAY) for outcome in check_rendered(kubectl, folder)]


def check_rendered(kubectl: str, folder: str) -> list[Outcome]:
    """Renders a folder with kustomize and checks the result."""
    what = f"kubectl kustomize {folder}"
    rendered = subprocess.run([kubectl, "kustomize", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if rendered.returncode:
        return [Outcome("failed", what, rendered.stderr)]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rendered.yaml"
        path.write_text(rendered.stdout, encoding="utf-8")
        return [Outcome("ok", what), run_tool("kubernetes-validate", "--strict", "--quiet", str(path))]


def check_prometheus() -> list[Outcome]:
    """Checks the Prometheus configurations with promtool, if it is installed."""
    if find_tool("promtool") is None:
        return [Outcome("not checked", f"promtool check config {PROMETHEUS[0]}", "promtool is not installed")]
    return [run_tool("promtool", "check", "config", *PROMETHEUS)]


CHECKS: Sequence[Callable[[], list[Outcome]]] = (check_compose, check_dockerfile, check_kubernetes, check_prometheus)


def main() -> int:
    """Prints every outcome; returns 1 if a check failed."""
    outcomes = [outcome for check in CHECKS for outcome in check()]
    for outcome in outcomes:
        print(f"{outcome.status:<12} {outcome.what}")
        if outcome.detail:
            print("".join(f"{'':<13}{line}\n" for line in outcome.detail.strip().splitlines()), end="")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
