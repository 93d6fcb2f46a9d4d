"""Compose, Dockerfile, Kubernetes and Prometheus agree with each other, and `deploy/check.py` finds mistakes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from marginrm_service.graceful import LONGEST_IDLE
from marginrm_service.settings import Settings
from marginrm_service.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
UID = 10001


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def dockerfile() -> list[tuple[str, str]]:
    """Returns (instruction, rest) of every instruction, with continuation lines joined."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line and not line.startswith("#")]


def last(instruction: str) -> str:
    return [rest for name, rest in dockerfile() if name == instruction][-1]


def probed(command: list[str]) -> tuple[int | None, str]:
    """Returns port and route of a health check written in Python."""
    url = urlsplit(re.findall(r"http://[^']+", " ".join(command))[0])
    return url.port, url.path


@pytest.fixture(scope="module")
def server() -> dict[str, Any]:
    return load_yaml("compose.yaml")["services"]["server"]


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    return load_yaml("deploy/kubernetes/base/deployment.yaml")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    sys.path.insert(0, str(ROOT / "deploy"))  # as for `python deploy/check.py`
    spec = importlib.util.spec_from_file_location("deploy_check", ROOT / "deploy/check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_port_everywhere(server, pod):
    entrypoint = json.loads(last("ENTRYPOINT"))
    port = int(entrypoint[entrypoint.index("--port") + 1])
    service = load_yaml("deploy/kubernetes/base/service.yaml")["spec"]["ports"]
    container = pod["containers"][0]["ports"]
    targets = load_yaml("docker/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    health = json.loads(last("HEALTHCHECK").split("CMD", 1)[1])
    assert port == int(last("EXPOSE"))
    assert [published.rsplit(":", 1)[1] for published in server["ports"]] == [str(port)]
    assert [(p["name"], p["containerPort"]) for p in container] == [("http", port)]
    assert [(p["port"], p["targetPort"]) for p in service] == [(port, "http")]
    assert targets == [f"server:{port}"]
    assert probed(health) == (port, "/healthz")
    assert probed(server["healthcheck"]["test"]) == (port, "/readyz")


def test_probes_use_the_documented_routes(pod):
    probes = {name: pod["containers"][0][f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}


def test_the_server_has_time_to_drain(server, pod):
    drain = Settings.model_fields["drain_seconds"].default
    assert int(server["stop_grace_period"].removesuffix("s")) > drain
    assert pod["terminationGracePeriodSeconds"] > drain


def test_the_grace_period_covers_every_phase_of_the_shutdown(pod):
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = Settings.model_fields["drain_seconds"].default
    assert pod["terminationGracePeriodSeconds"] > before + LONGEST_IDLE + drain


def with_keys() -> dict[str, Any]:
    """Returns the deployment with the overlay's patch, which adds to mappings and to ends of lists."""
    patch = load_yaml("deploy/kubernetes/components/keys/kustomization.yaml")["patches"][0]
    deployment = load_yaml("deploy/kubernetes/base/deployment.yaml")
    assert patch["target"] == {"kind": deployment["kind"], "name": deployment["metadata"]["name"]}
    for operation in yaml.safe_load(patch["patch"]):
        assert operation["op"] == "add"
        *path, last_part = operation["path"].removeprefix("/").split("/")
        place = deployment
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        if last_part == "-":
            place.append(operation["value"])
        else:
            assert last_part not in place
            place[last_part] = operation["value"]
    return deployment


def test_keys_come_from_a_mounted_secret_that_only_the_server_reads(check, tmp_path):
    deployment = with_keys()
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    key_file = Path(next(one["value"] for one in container["env"] if one["name"] == "MARGINRM_KEY_FILE"))
    mount = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == str(key_file.parent))
    assert "subPath" not in mount
    volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    documented = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    assert f"secret generic {volume['secret']['secretName']} --from-file={key_file.name}=" in documented
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump(deployment), encoding="utf-8")
    outcome = check.run_tool("kubernetes-validate", "--strict", str(path))
    assert outcome.status == "ok", outcome.detail


def test_compose_with_keys_gives_the_server_the_hashes_and_prometheus_a_key():
    plain, keys = load_yaml("compose.yaml"), load_yaml("deploy/compose.keys.yaml")
    assert set(keys["services"]) <= set(plain["services"])
    variable, path = next(iter(keys["services"]["server"]["environment"].items()))
    prefix = Settings.model_config["env_prefix"]
    assert variable.removeprefix(prefix).lower() in Settings.model_fields
    assert path == f"/run/secrets/{keys['services']['server']['secrets'][0]}"
    bound = keys["services"]["prometheus"]["volumes"][0].split(":")
    assert bound[1] in {volume.split(":")[1] for volume in plain["services"]["prometheus"]["volumes"]}
    job = load_yaml(bound[0])["scrape_configs"][0]
    without = {name: value for name, value in job.items() if name != "authorization"}
    assert without == load_yaml("docker/prometheus.yml")["scrape_configs"][0]
    (secret,) = keys["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for file in keys["secrets"].values():
        assert f"/{Path(file['file']).parent}/" in ignored


def test_threads_follow_the_requested_cores(pod):
    container = pod["containers"][0]
    threads = {variable["name"]: variable["valueFrom"]["resourceFieldRef"]["resource"] for variable in container["env"]}
    assert threads == {"OMP_NUM_THREADS": "requests.cpu"}
    assert container["resources"]["requests"]["cpu"].isdigit(), "a fraction would be rounded up"


def test_kubernetes_sets_no_variable_that_the_server_reads(pod):
    service = load_yaml("deploy/kubernetes/base/service.yaml")["metadata"]["name"]
    prefix = Settings.model_config["env_prefix"]
    assert not f"{service.upper()}_PORT".startswith(prefix) or pod["enableServiceLinks"] is False


def test_signals_reach_the_server():
    for instruction in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(last(instruction)), list), "shell form: a shell would be process 1"
    assert json.loads(last("ENTRYPOINT"))[:2] == ["marginrm", "serve"]


def test_image_compose_and_kubernetes_serve_the_same_model(server, pod):
    assert json.loads(last("CMD")) == server["command"] == pod["containers"][0]["args"]
    copied = [rest for name, rest in dockerfile() if name == "COPY" and "--from=demo" in rest]
    assert shlex.split(copied[0])[-1] == server["command"][-1]
    assert server["image"] == pod["containers"][0]["image"]


def test_nothing_runs_as_root_or_writes_to_its_image(server, pod):
    assert last("USER") == f"{UID}:{UID}"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == UID
    container = pod["containers"][0]["securityContext"]
    assert container["readOnlyRootFilesystem"] is True
    assert container["allowPrivilegeEscalation"] is False
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/tmp"]
    assert server["tmpfs"] == ["/tmp:exec"]  # compiled layers are loaded from there
    assert server["read_only"] is True


def test_ports_are_published_on_this_host_only():
    services = load_yaml("compose.yaml")["services"]
    published = [port for service in services.values() for port in service["ports"]]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert all("mem_limit" in service for service in services.values())


def test_selectors_match_the_pods():
    labels = load_yaml("deploy/kubernetes/base/deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert load_yaml("deploy/kubernetes/base/deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load_yaml("deploy/kubernetes/base/service.yaml")["spec"]["selector"] == labels
    assert load_yaml("deploy/kubernetes/base/poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load_yaml("deploy/kubernetes/base/networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    monitor = load_yaml("deploy/kubernetes/components/monitoring/servicemonitor.yaml")["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    (canary,) = load_yaml("deploy/kubernetes/overlays/canary/kustomization.yaml")["labels"]
    named = load_yaml("deploy/kubernetes/base/service.yaml")["metadata"]["labels"], canary["pairs"]
    assert [{expression["key"]: value} for value in expression["values"]] == list(named)


def test_a_canary_shares_no_pod_with_the_present_model_and_a_shadow_gets_copies_only():
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, which renders overlays")
    command = [kubectl, "kustomize", "deploy/kubernetes/overlays/shadow"]
    rendered = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    resources = {one["kind"]: one for one in yaml.safe_load_all(rendered)}
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert (
        resources["Service"]["spec"]["selector"] == resources["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    )
    assert labels != load_yaml("deploy/kubernetes/base/service.yaml")["spec"]["selector"]
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (rule,) = resources["HTTPRoute"]["spec"]["rules"]
    assert [one["name"] for one in rule["backendRefs"]] == ["marginrm"]
    assert rule["filters"][0]["requestMirror"]["backendRef"]["name"] == resources["Service"]["metadata"]["name"]
    assert resources["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"][1].startswith("canary=")


def test_every_kustomization_names_its_manifests():
    files = sorted((ROOT / "deploy/kubernetes").rglob("kustomization.yaml"))
    assert len(files) == 14
    for file in files:
        manifests = {path.name for path in file.parent.glob("*.yaml")} - {"kustomization.yaml", "adapter.yaml"}
        named = load_yaml(str(file.relative_to(ROOT))).get("resources", [])
        assert {name for name in named if name.endswith(".yaml")} == manifests, file


def test_the_autoscaler_and_the_adapter_name_one_metric_that_the_server_has():
    (patch,) = load_yaml("deploy/kubernetes/components/autoscaling-tokens/kustomization.yaml")["patches"]
    metric = yaml.safe_load(patch["patch"])[0]["value"]["pods"]["metric"]["name"]
    (rule,) = load_yaml("deploy/kubernetes/components/autoscaling-tokens/adapter.yaml")["rules"]["custom"]
    assert rule["name"]["as"] == metric
    assert rule["seriesQuery"].startswith(metric)
    assert metric in {family.name for family in Metrics().collect()}


def test_mounted_files_exist():
    compose = load_yaml("compose.yaml")
    sources = [v.split(":")[0] for service in compose["services"].values() for v in service.get("volumes", [])]
    bound = [source for source in sources if source.startswith("./")]
    assert bound
    assert [source for source in bound if not (ROOT / source).exists()] == []
    assert {source for source in sources if not source.startswith("./")} == set(compose["volumes"])


def test_the_image_is_built_from_files_that_its_context_holds():
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    copied = [rest for name, rest in dockerfile() if name == "COPY" and not rest.startswith("--from")]
    sources = {source for rest in copied for source in rest.split()[:-1]}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)


def test_every_target_of_the_image_ends_without_root():
    users: dict[str, str] = {}
    for name, rest in dockerfile():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            users[stage] = users.get(base, "root")
            current = stage
        elif name == "USER":
            users[current] = rest
    assert {users[target] for target in ("server", "server-cuda", "ray", "train")} == {f"{UID}:{UID}"}


def test_the_hashed_packages_of_the_image_are_the_pinned_ones():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    text = (ROOT / "docker/requirements.txt").read_text(encoding="utf-8")
    hashed = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n +--hash=sha256:", text, re.MULTILINE))
    assert "fastapi" in hashed
    assert "torch" not in hashed, "its build is chosen by TORCH_INDEX_URL"
    assert {name: pins.get(name) for name in hashed if name != "setuptools"} == {
        name: version for name, version in hashed.items() if name != "setuptools"
    }


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "docker/grafana/dashboards/marginrm.json").read_text(encoding="utf-8"))


def test_the_dashboard_uses_the_provisioned_datasource_and_folder():
    datasource = load_yaml("docker/grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    provider = load_yaml("docker/grafana/provisioning/dashboards/marginrm.yml")["providers"][0]
    mounts = load_yaml("compose.yaml")["services"]["grafana"]["volumes"]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {datasource["uid"]}
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in mounts
    assert datasource["url"] == "http://prometheus:9090"


def exported() -> set[str]:
    """Returns the names of the server's metrics, without the endings of histograms."""
    families = list(Metrics().collect())
    return {family.name for family in families} | {
        f"{family.name}_total" for family in families if family.type == "counter"
    }


def alerts() -> list[dict[str, Any]]:
    (group,) = load_yaml("docker/alerts.yml")["groups"]
    return group["rules"]


def test_every_alert_has_a_runbook_and_a_test_and_uses_metrics_that_the_server_has():
    named = [rule["alert"] for rule in alerts() if "alert" in rule]
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Marginrm\w+)$", page, re.MULTILINE) == named
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in alerts() if "alert" in rule}
    for name, severity in severities.items():
        assert re.search(rf"^### {name}\n\n\*{severity.capitalize()}\.\*", page, re.MULTILINE), name
    cases = [case for test in load_yaml("docker/alerts.test.yml")["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(named)
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(named)
    asked = {name for rule in alerts() for name in re.findall(r"\bmarginrm_\w+", rule["expr"])}
    assert sorted({name.removesuffix("_bucket") for name in asked} - exported()) == []


def test_the_dashboard_uses_metrics_that_the_server_has():
    asked = {
        name.removesuffix("_bucket")
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bmarginrm_\w+", target["expr"])
    }
    assert asked
    assert sorted(asked - exported()) == []


def test_every_deployment_file_passes(check, capsys):
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        assert line.startswith(("ok ", "not checked ", " "))
    assert re.search(r"^ok +check-jsonschema .*compose.yaml$", printed, re.MULTILINE)
    assert re.search(
        r"^ok +(kubectl kustomize deploy/kubernetes|deploy/kubernetes/base/deployment.yaml) ", printed, re.MULTILINE
    )
    assert re.search(r"^ok +deploy/ray-serve/rayservice.yaml \(1 resources\)$", printed, re.MULTILINE)


RAY, MONITOR = "deploy/ray-serve/rayservice.yaml", "deploy/kubernetes/components/monitoring/servicemonitor.yaml"


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("deploy/kubernetes/base/networkpolicy.yaml", "policyTypes", "policyType"),
        ("deploy/kubernetes/components/autoscaling-cpu/hpa.yaml", "maxReplicas: 10", "maxReplicas: ten"),
        (RAY, "runAsUser: 10001", "runAsUser: root"),
        (MONITOR, "interval: 15s", "interval: fifteen"),
    ],
)
def test_the_checks_find_mistakes_in_manifests(check, file, right, wrong):
    text = (ROOT / file).read_text(encoding="utf-8")
    right_one = sys.modules["manifests"].check_text(file, text, {})
    if file == MONITOR and len(right_one) > 1:
        pytest.skip(right_one[1].detail)
    assert right_one[0].status == "ok"
    broken = sys.modules["manifests"].check_text(file, text.replace(right, wrong), {})
    assert broken[0].status == "failed"
    assert broken[0].detail


def test_a_definition_of_a_custom_resource_finds_unknown_fields_and_wrong_types(check, tmp_path):
    spec = {"type": "object", "properties": {"size": {"x-kubernetes-int-or-string": True}, "name": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "spec": spec},
    }
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    definition = {"spec": {"group": "ray.io", "names": {"kind": "Thing"}, "versions": versions}}
    (tmp_path / "thing.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    definitions = sys.modules["manifests"].definitions_in(tmp_path)

    def status(**fields: Any) -> str:
        thing = {"apiVersion": "ray.io/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": fields}
        return sys.modules["manifests"].check_text("thing", yaml.safe_dump(thing), definitions)[0].status

    assert [status(size=1, name="a"), status(size="10%")] == ["ok", "ok"]
    assert [status(sizes=1), status(name=1)] == ["failed", "failed"]


def test_copies_are_noticed_when_their_source_changes(check, monkeypatch, capsys):
    sys.modules.pop("generate", None)
    generate = importlib.import_module("generate")
    target, source = next(iter(generate.COPIES.items()))
    monkeypatch.setattr(generate, "COPIES", {target: "docker/alerts.yml"})
    with pytest.raises(ValueError, match=r"the lines .# generated from docker/alerts\.yml. and .# end. are missing"):
        generate.refreshed(target, "docker/alerts.yml")
    assert yaml.safe_load(load_yaml(target)["spec"]["serveConfigV2"]) == load_yaml(source)


@pytest.mark.parametrize(
    ("tool", "arguments", "file", "right", "wrong"),
    [
        ("check-jsonschema", ["--builtin-schema", "vendor.compose-spec"], "compose.yaml", "mem_limit:", "memlimit:"),
        ("kubernetes-validate", ["--strict"], "deploy/kubernetes/base/deployment.yaml", "replicas:", "replica:"),
        ("kubernetes-validate", ["--strict"], "deploy/kubernetes/base/service.yaml", "port: 8000", "port: eighty"),
        ("hadolint", [], "docker/Dockerfile", "RUN useradd", "RUN sudo useradd"),
    ],
)
def test_the_checks_find_mistakes(check, tmp_path, tool, arguments, file, right, wrong):
    text = (ROOT / file).read_text(encoding="utf-8")
    broken = tmp_path / Path(file).name
    broken.write_text(text, encoding="utf-8")
    assert check.run_tool(tool, *arguments, str(broken)).status == "ok"
    broken.write_text(text.replace(right, wrong), encoding="utf-8")
    outcome = check.run_tool(tool, *arguments, str(broken))
    assert outcome.status == "failed"
    assert outcome.detail


def test_a_missing_tool_is_a_failure_that_names_it(check):
    outcome = check.run_tool("no-such-linter", "compose.yaml")
    assert outcome.status == "failed"
    assert "no-such-linter" in outcome.detail
