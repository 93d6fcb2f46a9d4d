"""The distribution: commands, imports at run time, pinned versions, and no trace of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {
    "inspect",
    "convert",
    "score",
    "serve",
    "key",
    "train",
    "ablate",
    "evaluate",
    "audit",
    "calibrate",
    "compare",
    "best-of-n",
    "demo",
    "rollout",
    "size",
}
EXTRAS = ("service", "training", "dev")
INSTALLED = frozenset(EXTRAS) | ({"ray"} if find_spec("ray") else set())
TORCHLESS = ("client", "errors", "manifest", "texts.preferences", "ranking", "schemas")

# The accelerator libraries of torch depend on the build that a machine installs, so they have no pin.
OF_THE_BUILD = re.compile(r"(nvidia|cuda)-.*|.*triton.*")


def read_pins() -> dict[str, str]:
    """Returns name -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def closure(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Returns every distribution that `name[extras]` needs on this platform."""
    name = canonicalize_name(name)
    if extras <= seen.get(name, frozenset()) and name in seen:
        return seen
    seen[name] = seen.get(name, frozenset()) | extras
    for text in requires(name) or []:
        requirement = Requirement(text)
        if OF_THE_BUILD.fullmatch(requirement.name):
            continue
        environments = [{"extra": extra} for extra in seen[name] | {""}]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            closure(requirement.name, frozenset(requirement.extras), seen)
    return seen


def declared_requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_documented_command_is_installed_and_loads():
    found = {point.name: point for point in entry_points(group="marginrm.commands") if point.dist is not None}
    assert set(found) == COMMANDS == set(PROJECT["entry-points"]["marginrm.commands"])
    for point in found.values():
        assert callable(point.load()), point


def test_the_command_lists_its_subcommands():
    script = Path(sys.executable).with_name("marginrm")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {name for name in COMMANDS if re.search(rf"\b{name}\b", done.stdout)} == COMMANDS


def test_the_version_is_stated_once():
    import marginrm

    assert marginrm.__version__ == version("marginrm") == PROJECT["version"]


def test_a_client_starts_without_torch():
    names = ", ".join(f"marginrm.{name}" for name in TORCHLESS)
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy', 'fastapi'}"
    code = f"import sys, marginrm, marginrm.cli.main, {names}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_python_versions_agree():
    assert PROJECT["requires-python"] == ">=3.11"
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    searched = re.findall(r"python(3\.\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert classified == ["3.11", "3.12", "3.13", "3.14"]
    assert set(classified) == set(searched)


def test_the_three_packages_are_typed():
    for package in ("src/marginrm", "service/marginrm_service", "training/marginrm_training"):
        assert (ROOT / package / "py.typed").is_file()
        assert (ROOT / package / "__init__.py").is_file()


def test_extras_declare_what_the_packages_import():
    names = {extra: {Requirement(t).name for t in PROJECT["optional-dependencies"][extra]} for extra in EXTRAS}
    model = {"torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy"}
    assert model <= names["service"] & names["training"]
    assert not {Requirement(text).name for text in PROJECT["dependencies"]} & model


def test_constraints_cover_a_full_install():
    pins = read_pins()
    needed = set(closure("marginrm", INSTALLED, {})) - {"marginrm"}
    assert sorted(needed - set(pins)) == []


def test_installed_versions_are_the_pinned_ones():
    pins = read_pins()
    needed = set(closure("marginrm", INSTALLED, {})) - {"marginrm"}
    installed = {name: distribution(name).version.split("+")[0] for name in needed}
    assert {name: found for name, found in installed.items() if pins.get(name) != found} == {}


@pytest.mark.parametrize("requirement", declared_requirements(), ids=str)
def test_pins_satisfy_the_declared_ranges(requirement: Requirement):
    assert requirement.specifier.contains(read_pins()[canonicalize_name(requirement.name)])


def test_pins_hold_no_addresses_and_no_local_builds():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


# Written in pieces, so that the test does not find this file.
FOREIGN = {
    "a package registry": ["pypi" + r"\.org", "python" + "hosted", "npm" + r"js\.", "download.py" + r"torch\.org"],
    "a folder of one machine": [r"(?<![\w.])/" + "work/", r"(?<![\w.])/" + "root\\b", "/" + r"home/\w"],
    "an unfinished piece": [r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"raise NotImplemented" + "Error"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_tracked_files_name_no_registry_no_machine_and_no_unfinished_work(kind: str):
    pattern = re.compile("|".join(FOREIGN[kind]))
    found = []
    for path in tracked_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_large_or_generated_file_is_tracked():
    generated = re.compile(r"(^|/)(checkpoints|runs|\.venv|__pycache__)/|\.(safetensors|pyc)$")
    names = {path: str(path.relative_to(ROOT)) for path in tracked_files()}
    assert [name for path, name in names.items() if generated.search(name) or path.stat().st_size > 1_000_000] == []


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"make (\w+)", make())) == set(phony[1].split())


def test_make_serve_trains_the_demo_only_for_the_demo():
    ready = ["--assume-old=pyproject.toml", "--assume-old=constraints.txt"]
    demo = make("--dry-run", *ready, "serve", "PORT=8123")
    assert "marginrm demo --if-missing --output checkpoints/demo" in demo
    assert '--port "8123"' in demo
    own = make("--dry-run", *ready, "serve", "MODEL=some/checkpoint")
    assert "marginrm demo" not in own
    assert '--model "some/checkpoint"' in own


def test_make_names_the_version_when_no_python_fits():
    command = ["make", "setup", "PYTHON=", "READY=no-such-stamp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
