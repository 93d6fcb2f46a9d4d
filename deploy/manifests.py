"""Checks of Kubernetes resources: every overlay is rendered, and every resource is held against its schema.

Kubernetes' own kinds have their schemas in the package kubernetes-validate. Those of the Prometheus Operator and of the
Gateway API come from npm packages, which `.ci/run` installs into build/schemas. KubeRay's are in no package registry. For
them, and instead of the packages, `--crds FOLDER` takes definitions as the projects publish them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from outcome import ROOT, Outcome, find_tool

SCHEMAS = ROOT / "build/schemas/node_modules"
PACKAGES = {
    "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
    "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
}
KUBERAY = "ray.io"
_VALIDATE = """
import { readFileSync } from "node:fs";
const resource = JSON.parse(readFileSync(0));
const [group, version] = resource.apiVersion.split("/");
const models = await import(`${process.argv[1]}/${group}/${version}/index.js`);
new models[resource.kind](resource).validate();
"""


def check_kubernetes(crds: Path | None = None) -> list[Outcome]:
    """Checks every overlay, and the resources of KubeRay.

    Args:
        crds: A folder of custom resource definitions in YAML.
    """
    definitions = definitions_in(crds) if crds else {}
    kubectl = find_tool("kubectl")
    outcomes = []
    if kubectl is None:
        reason = "kubectl is not installed; resources were checked one by one, and patches were not"
        outcomes.append(Outcome("not checked", "kubectl kustomize", reason))
        for path in sorted((ROOT / "deploy/kubernetes").rglob("*.yaml")):
            if path.name not in {"kustomization.yaml", "adapter.yaml"}:
                outcomes += check_text(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), definitions)
    else:
        for path in sorted((ROOT / "deploy").rglob("kustomization.yaml")):
            if yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] == "Kustomization":
                outcomes += _render(kubectl, str(path.parent.relative_to(ROOT)), definitions)
    for path in sorted((ROOT / "deploy").glob("ray-*/*.yaml")):
        if "\napiVersion:" in (text := path.read_text(encoding="utf-8")):
            outcomes += check_text(str(path.relative_to(ROOT)), text, definitions)
    return outcomes


def _render(kubectl: str, folder: str, definitions: dict[tuple[str, str], Any]) -> list[Outcome]:
    """Renders a folder with kustomize and checks the result."""
    what = f"kubectl kustomize {folder}"
    done = subprocess.run([kubectl, "kustomize", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    return check_text(what, done.stdout, definitions) if not done.returncode else [Outcome("failed", what, done.stderr)]


def check_text(what: str, text: str, definitions: dict[tuple[str, str], Any]) -> list[Outcome]:
    """Checks the resources of a file or of an overlay: one outcome, and one for each resource without a schema here."""
    faults, missing, count = [], [], 0
    for resource in yaml.safe_load_all(text):
        count += 1
        name = f"{resource['kind']}/{resource['metadata']['name']}"
        try:
            reason = _hold_against_schema(resource, definitions)
        except _InvalidError as error:
            faults.append(f"{name}: {error}")
        else:
            if reason:
                missing.append(Outcome("not checked", f"{what}: {name}", reason))
    detail = "\n".join(faults)
    return [Outcome("failed" if faults else "ok", f"{what} ({count} resources)", detail), *missing]


class _InvalidError(Exception):
    """A resource does not fit its schema."""


def _hold_against_schema(resource: dict[str, Any], definitions: dict[tuple[str, str], Any]) -> str | None:
    """Checks one resource; returns why its own kind was not checked, or None.

    Raises:
        _InvalidError: It does not fit.
    """
    group = resource["apiVersion"].partition("/")[0]
    schema = definitions.get((resource["apiVersion"], resource["kind"]))
    if schema is not None:
        _validate(resource, schema)
        return None
    if group == KUBERAY:
        for template in _pod_templates(resource["spec"]):
            _validate_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template})
        return "its pods were checked; no package has KubeRay's schema, so pass --crds"
    if group in PACKAGES:
        return _validate_with_package(resource, PACKAGES[group])
    _validate_kubernetes(resource)
    return None


def _validate_kubernetes(resource: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        raise _InvalidError(f"{'.'.join(map(str, getattr(error, 'path', ())))}: {error.message}") from error


def _validate_with_package(resource: dict[str, Any], package: str) -> str | None:
    node = find_tool("node")
    if node is None or not (SCHEMAS / package).is_dir():
        return f"install its schema: npm install --no-save --prefix build/schemas {package}"
    command = [node, "--input-type=module", "--eval", _VALIDATE, f"{SCHEMAS / package}"]
    done = subprocess.run(command, input=json.dumps(resource), capture_output=True, text=True, check=False)
    if done.returncode:
        raise _InvalidError(done.stderr)
    return None


def _pod_templates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the pod templates of a RayService, a RayJob or a RayCluster."""
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster.get("workerGroupSpecs", ()))
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]


def definitions_in(folder: Path) -> dict[tuple[str, str], Any]:
    """Returns the schemas of the custom resource definitions in a folder, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for definition in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            spec = definition["spec"]
            for version in spec["versions"]:
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = _strict(version["schema"]["openAPIV3Schema"])
    return found


def _strict(schema: Any) -> Any:
    """Returns a structural schema that also refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        return {**schema, "type": ["integer", "string"]}
    if (
        isinstance(schema.get("properties"), dict)
        and "type" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        schema.setdefault("additionalProperties", False)
    return schema


def _validate(resource: dict[str, Any], schema: Any) -> None:
    at_top = {**schema["properties"], "metadata": {"type": "object"}}
    for error in jsonschema.Draft7Validator({**schema, "properties": at_top}).iter_errors(resource):
        raise _InvalidError(f"{error.json_path}: {error.message[:300]}")
