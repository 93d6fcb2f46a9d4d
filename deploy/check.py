"""Checks the deployment files without starting anything: Compose, Dockerfile, Kubernetes, Prometheus.

`make check` runs it. Each check prints its command. A check that cannot run here prints the reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from manifests import check_kubernetes
from outcome import Outcome, find_tool, run_tool

COMPOSE = ("compose.yaml", "deploy/compose.keys.yaml")
PROMETHEUS = ("docker/prometheus.yml", "docker/prometheus.keys.yml")
ALERTS, ALERT_TESTS = "docker/alerts.yml", "docker/alerts.test.yml"


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


def check_prometheus() -> list[Outcome]:
    """Checks the Prometheus configurations and runs the tests of the alerts, if promtool is installed."""
    if find_tool("promtool") is None:
        return [Outcome("not checked", "promtool test rules", "promtool is not installed (Debian: prometheus)")]
    return [
        # The files that a configuration names are in the container.
        run_tool("promtool", "check", "config", "--syntax-only", *PROMETHEUS),
        run_tool("promtool", "check", "rules", ALERTS),
        run_tool("promtool", "test", "rules", ALERT_TESTS),
    ]


def check_copies() -> list[Outcome]:
    """Checks that no generated resource differs from its source."""
    return [run_tool(sys.executable, "deploy/generate.py", "--check")]


def check_scripts() -> list[Outcome]:
    """Parses the shell script; `docs/deployment.md` records its last run."""
    return [run_tool("bash", "-n", "deploy/rehearse.sh")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every outcome; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crds", type=Path, help="folder of custom resource definitions in YAML")
    crds = parser.parse_args(arguments).crds
    checks = (
        check_compose,
        check_dockerfile,
        lambda: check_kubernetes(crds),
        check_prometheus,
        check_copies,
        check_scripts,
    )
    outcomes = [outcome for check in checks for outcome in check()]
    for outcome in outcomes:
        print(f"{outcome.status:<12} {outcome.what}")
        if outcome.detail:
            print("".join(f"{'':<13}{line}\n" for line in outcome.detail.strip().splitlines()), end="")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
